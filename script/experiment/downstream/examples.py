"""How do the base and LongQLoRA continue real texts, after long and after short prompts? Drawn as pictures.

    python script/experiment/downstream/examples.py --base output/experiment/base \\
        --extended output/experiment/runs/yarn-last-8192-0 --source books-validation.jsonl.xz \\
        --work output/experiment/examples --output_json figure/experiment_examples.json \\
        --long_figure figure/experiment_examples_long.png \\
        --short_figure figure/experiment_examples_short.png

Passages are sampled at random and the first few are shown, without selection. script/inference/inference.py generates
the continuations; prompts beyond the base's context are truncated on the left. The perplexity of the true next tokens
is reported for the base on the truncated prompt, and on the whole prompt for LongQLoRA and for the base with scaled
positions without training.
"""

import argparse
import json
import math
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base of script/experiment/pretrain.py")
    parser.add_argument("--extended", type=Path, required=True, help="LongQLoRA adapter or merged model")
    parser.add_argument("--source", type=Path, required=True, help='held-out file of {"text"} records')
    parser.add_argument("--work", type=Path, required=True, help="folder for prompts, continuations and logs")
    parser.add_argument("--long_tokens", type=int, nargs=2, default=[3000, 6000], help="min and max (3000 6000)")
    parser.add_argument("--new_tokens", type=int, default=100, help="to generate and to score (100)")
    parser.add_argument("--passages", type=int, default=16, help="long and short ones each (16)")
    parser.add_argument("--shown", type=int, default=2, help="passages per figure (2)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling, with top_p 0.9 (0.7)")
    parser.add_argument("--about", help="a sentence about the models, for the captions (their size)")
    parser.add_argument("--seed", type=int, default=42, help="of passages and sampling (42)")
    parser.add_argument("--output_json", required=True, help="file for all continuations and perplexities")
    parser.add_argument("--long_figure", required=True, help="PNG file: long prompts")
    parser.add_argument("--short_figure", required=True, help="PNG file: short prompts")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import torch
from matplotlib.figure import Figure
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from component.error import UserError
from component.inference.context import fit_prompt
from component.loading import default_device, extended_config_of, inference_dtype, load_model
from component.loss import next_token_losses
from component.model import load_base, load_config
from component.rope import context_length
from component.storage.result import origin, save_figure, write_json
from component.tokenizer import UNLIMITED, load_tokenizer
from script.experiment.downstream.passages import Passage, passages
from script.experiment.downstream.transcript import Block, draw
from script.experiment.downstream.tuning import check_flags, held
from script.shared.program import execute

SHORT_TOKENS = (180, 240)
SHOWN_CHARACTERS = 420  # of a prompt's end
GREY, ORANGE, BLUE, GREEN = "#6b6b6b", "#c24e00", "#0072b2", "#00795b"


def check(flags: argparse.Namespace) -> None:
    if not 1 <= flags.shown <= flags.passages:
        raise UserError(f"--shown: {flags.shown}; use 1 to --passages {flags.passages}")
    if not 1 <= flags.long_tokens[0] <= flags.long_tokens[1]:
        raise UserError(f"--long_tokens: {flags.long_tokens}; give the minimum, then the maximum")
    check_flags(flags, folders=("base", "extended", "work"))


def generate(name: str, model: list[str], prompts: Path, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The records that inference.py writes for `prompts`."""
    output = flags.work / f"{name}.jsonl"
    output.unlink(missing_ok=True)  # else inference.py resumes after its last line
    sampling = {"max_new_tokens": flags.new_tokens, "temperature": flags.temperature, "seed": flags.seed}
    words = [word for key, value in sampling.items() for word in (f"--{key}", str(value))]
    files = ["--input_jsonl", str(prompts), "--output_jsonl", str(output), "--truncate", "left"]
    execute(["script/inference/inference.py", *model, *files, *words], output.with_suffix(".log"))
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def extended_config(flags: argparse.Namespace) -> PretrainedConfig:
    """LongQLoRA's, with the context that its record says if its base frequency was raised."""
    return extended_config_of(str(flags.extended), None, is_fixed=is_adapter(flags.extended), field="--extended")


def stretched(flags: argparse.Namespace) -> PreTrainedModel:
    """The base's weights with LongQLoRA's positions."""
    config, device = extended_config(flags), default_device()
    dtype = inference_dtype(device, load_config(str(flags.base), "--base").dtype)
    return load_base(str(flags.base), config, dtype=dtype, load_in_4bit=False, device=device).eval()


@torch.no_grad()
def nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passage: Passage, new_tokens: int) -> float:
    """Mean loss of the true continuation in nats per token; long prompts are truncated as in inference.py."""
    prompt = tokenizer(passage["prompt"]).input_ids
    prompt, _ = fit_prompt(prompt, context_length(model.config), new_tokens, "left", 1)
    true = tokenizer(passage["true"], add_special_tokens=False).input_ids
    ids = torch.tensor([prompt + true], device=model.device)
    return next_token_losses(model, ids)[0, -len(true) :].mean().item()


def picture(found: list[Passage], kind: str, parameters: int, flags: argparse.Namespace) -> Figure:
    """The first passages of a kind: end of the prompt, both continuations side by side, the true continuation."""
    of_kind, rows = [passage for passage in found if passage["kind"] == kind], []
    for passage in of_kind[: flags.shown]:
        count, end = f"{passage['tokens']:,}", passage["prompt"][-SHOWN_CHARACTERS:]
        if len(passage["prompt"]) > SHOWN_CHARACTERS:
            end = f"… {end.partition(' ')[2]}"
        beside = []
        for name, label, colour in (("base", "Base", ORANGE), ("longqlora", "LongQLoRA", BLUE)):
            read = passage[name]["prompt_tokens"]
            part = f"all {count} tokens" if read == passage["tokens"] else f"the last {read:,} of {count} tokens"
            note = f"perplexity of the true continuation: {math.exp(passage['nats'][name]):.1f}"
            beside.append(Block(f"{label}, reading {part}", passage[name]["completion"], colour, note))
        title = f"End of the prompt, {count} tokens of {passage['source']}"
        rows += [[Block(title, end, GREY)], beside, [Block("True continuation", passage["true"], GREEN)], []]
    return draw(f"Continuing {kind} prompts, before and after LongQLoRA", rows, caption(of_kind, parameters, flags))


def caption(found: list[Passage], parameters: int, flags: argparse.Namespace) -> str:
    of = {name: math.exp(mean(passage["nats"][name] for passage in found)) for name in found[0]["nats"]}
    about = flags.about or f"Models of {parameters / 1e6:.0f} M parameters"
    return (
        f"{about}. The first {flags.shown} of {len(found)} random passages, not selected; sampled at "
        f"temperature {flags.temperature:g}, top_p 0.9, seed {flags.seed}; line breaks are not shown. Perplexity of "
        f"the next {flags.new_tokens} true tokens over all {len(found)} passages: base on the truncated prompt "
        f"{of['base']:.1f}; on the whole prompt, base with positions scaled but untrained {of['stretched']:.1f}, "
        f"LongQLoRA {of['longqlora']:.1f}."
    )


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check(flags)
    with held(flags, "examples.py", "output_json", "long_figure", "short_figure"):
        compare(flags)


def compare(flags: argparse.Namespace) -> None:
    has_base = is_adapter(flags.extended)
    extended = (str(flags.base), str(flags.extended)) if has_base else (str(flags.extended), None)
    context = context_length(extended_config(flags))
    if flags.long_tokens[1] + flags.new_tokens > context:
        raise UserError(f"--long_tokens: {flags.long_tokens[1]}; use less, LongQLoRA's context is {context} tokens")
    tokenizer = load_tokenizer(str(flags.base), UNLIMITED)  # tokenizes whole books
    found: list[Passage] = []
    for kind, limits in (("long", tuple(flags.long_tokens)), ("short", SHORT_TOKENS)):
        sampled = passages(flags.source, tokenizer, limits, flags.new_tokens, f"{flags.seed} {kind}")
        found += [passage | {"kind": kind} for passage in islice(sampled, flags.passages)]
    prompts = flags.work / "prompts.jsonl"
    lines = [json.dumps({"prompt": passage["prompt"]}) + "\n" for passage in found]
    prompts.write_text("".join(lines), encoding="utf-8")
    adapter_words = ["--adapter_name_or_path", str(extended[1])] if has_base else []
    answers = {"base": generate("base", ["--model_name_or_path", str(flags.base)], prompts, flags)}
    answers["longqlora"] = generate("longqlora", ["--model_name_or_path", extended[0], *adapter_words], prompts, flags)
    scorers = {
        "base": partial(load_model, str(flags.base)),
        "stretched": partial(stretched, flags),
        "longqlora": partial(load_model, *extended),
    }
    parameters = 0
    for name, load in scorers.items():
        model = load()
        parameters = parameters or model.num_parameters()
        for number, passage in enumerate(found):
            passage.setdefault("nats", {})[name] = nats(model, tokenizer, passage, flags.new_tokens)
            if name in answers:
                passage[name] = {key: answers[name][number][key] for key in ("completion", "prompt_tokens")}
    save_figure(picture(found, "long", parameters, flags), flags.long_figure)
    save_figure(picture(found, "short", parameters, flags), flags.short_figure)
    shown = [passage | {"prompt": passage["prompt"][-SHOWN_CHARACTERS:]} for passage in found]
    write_json(flags.output_json, {"parameters": parameters, "seed": flags.seed, "passages": shown, **origin()})


if __name__ == "__main__":
    main()
