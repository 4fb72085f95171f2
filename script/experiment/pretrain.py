"""How is the experiments' base pretrained: a 32 M Llama with a context of 1024 tokens, on novels and mathematics?

    python script/experiment/pretrain.py --tokenizer output/experiment/tokenizer \\
        --train books-train.jsonl.xz proof-train.jsonl.xz \\
        --validation books-validation.jsonl.xz proof-validation.jsonl.xz --minutes 2.5 --output output/experiment/base
    python script/experiment/pretrain.py ... --steps 4 --batch_size 2 --layers 2 --output /tmp/base  # quick CPU test

Writes a model folder for `from_pretrained`, with pretrain.json (record of the run) and pretrain.png (loss curve).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first
from script.experiment.rows import BASE_CONTEXT
from script.shared.training_flags import add_training_flags


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of script/experiment/tokenizer.py")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help='files of {"text"} records')
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="the same, for held-out loss")
    add_training_flags(parser, BASE_CONTEXT, batch_size=128, learning_rate=2e-3)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (8)")
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from component.storage.atomic import atomic_folder
from component.tokenizer import load_tokenizer
from script.experiment.tokenizer import texts_of
from script.shared.card import describe_card
from script.shared.pretraining import begin, build_model, describe, mean_loss, token_stream, train


def draw_curve(curve: list[dict], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    steps = [entry["step"] for entry in curve]
    for key, label in (("loss", "training batch"), ("held_out_loss", "held-out texts")):
        axes.plot(steps, [entry[key] for entry in curve], label=label, linewidth=1.6)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    device = begin(flags)
    texts = {file: texts_of(file) for file in (*flags.train, *flags.validation)}
    tokenizer = load_tokenizer(flags.tokenizer, field="--tokenizer")
    training = token_stream(tokenizer, [text for file in flags.train for text in texts[file]], flags.seed).to(device)
    held_out = {file.name: token_stream(tokenizer, texts[file], flags.seed).to(device) for file in flags.validation}
    mixed = torch.cat([stream[: 2**16] for stream in held_out.values()])
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": flags.layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = build_model(tokenizer, BASE_CONTEXT, rms_norm_eps=1e-5, **shape, **heads).to(device)
    sizes = {"training_tokens": len(training), "parameters": model.num_parameters()}
    print(sizes, flush=True)
    with atomic_folder(flags.output) as folder:  # locked during training against a second writer
        run = train(model, training, mixed, BASE_CONTEXT, flags)
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name)
        # forward and backward: 6 FLOP per weight and token; attention: 12 per (query, key) and channel, T / 2 pairs
        flop_per_token = 6 * matrices + 6 * flags.layers * model.config.hidden_size * BASE_CONTEXT
        run["tflops"] = round(flop_per_token * run["tokens_per_second"] / 1e12, 1)
        rate = describe_card()["matrix_tflops"]
        run["share_of_matrix_rate"] = round(run["tflops"] / rate, 3) if rate else None
        model.eval()
        losses = {name: mean_loss(model, stream, BASE_CONTEXT) for name, stream in held_out.items()}
        print({**losses, "tflops": run["tflops"]}, flush=True)
        record = {**describe(flags, BASE_CONTEXT), **sizes, **run, "held_out_loss": losses}
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        draw_curve(run["curve"], folder / "pretrain.png")


if __name__ == "__main__":
    main()
