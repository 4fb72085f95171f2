"""Train a small Llama that retrieves passkeys up to a length only: shows that passkey.py sees success and failure.

    python script/evaluate/passkey_model.py --output output/passkey-model
    python script/evaluate/passkey.py --base_model output/passkey-model --lengths 64 128 256 512 1024 --depths 9

Trained only on the prompts of component/evaluate/passkey.py, of random length and depth, short ones first, with a
tokenizer trained on them that splits digits. Writes an ordinary model folder with passkey_model.json.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest prompt (default 256)")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps (default 700)")
    parser.add_argument("--tokens_per_step", type=int, default=6144, help="tokens per batch (default 6144)")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from component.error import UserError
from component.evaluate.passkey import FILLER, INTRODUCTION, KEYS, NEEDLE, QUESTION, PromptMaker
from component.storage.atomic import atomic_folder, check_target
from component.storage.result import origin, write_json
from script.shared.pretraining import build_model, train_tokenizer

WARMUP_STEPS = 50
OTHER_WEIGHT = 0.05  # loss weight of tokens that do not copy the key


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the lines of the prompts; adds <s> and splits digits."""
    texts = [INTRODUCTION, *FILLER, NEEDLE, QUESTION] * 2
    return train_tokenizer(texts, 512, None, split_digits=True, show_progress=False)


def batch(maker: PromptMaker, rows: int, length: int, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of prompts with answers, (rows, length + answer), and the loss weight of each token."""
    ids, weights = [], []
    for _ in range(rows):
        key = str(draw.choice(KEYS))
        prompt = maker.prompt(length, draw.random(), key)
        answer = maker.tokens_of(f" {key}.")
        weight = [OTHER_WEIGHT] * length + [1.0] * len(answer)
        second_key = prompt.needle_end - len(maker.tokens_of(f" {key} is the pass key."))  # the needle repeats the key
        weight[second_key : second_key + len(answer)] = [1.0] * len(answer)
        ids.append(prompt.ids + answer)
        weights.append(weight)
    return torch.tensor(ids), torch.tensor(weights)


def longest_now(step: int, steps: int, shortest: int, longest: int) -> int:
    """Length curriculum: copying is learned at short distances first; full length from half of the steps on."""
    return round(shortest * (longest / shortest) ** min(1.0, 2.0 * step / steps))


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def train(model: LlamaForCausalLM, maker: PromptMaker, flags: argparse.Namespace) -> list[dict]:
    """AdamW with linear warmup and cosine decay; returns the loss curve."""
    shortest = len(maker.start) + len(maker.tokens_of(NEEDLE.format(key=KEYS[-1]))) + len(maker.question)
    if flags.length <= shortest:
        raise UserError(f"--length: {flags.length}; use more than {shortest} tokens, the shortest prompt")
    draw, curve, start = random.Random(flags.seed), [], time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(flags.steps):
        scale = min((step + 1) / WARMUP_STEPS, 0.05 + 0.475 * (1 + math.cos(math.pi * step / flags.steps)))
        optimizer.param_groups[0]["lr"] = flags.learning_rate * scale
        length = draw.randint(shortest, longest_now(step, flags.steps, shortest, flags.length))
        ids, weights = batch(maker, max(1, flags.tokens_per_step // length), length, draw)
        loss = weighted_loss(model, ids, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step == flags.steps - 1:
            curve.append({"step": step, "length": length, "loss": round(loss.item(), 4)})
            print(f"step {step:>5}  length {length:>5}  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s")
            sys.stdout.flush()
    return curve


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_target(flags.output, "--output")
    set_seed(flags.seed)
    tokenizer = make_tokenizer()
    width, heads = flags.hidden_size, flags.hidden_size // 32
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": flags.layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": True}
    model = build_model(tokenizer, flags.length, **shape)
    start = time.monotonic()
    with atomic_folder(flags.output) as folder:  # held while training: nobody else writes it meanwhile
        curve = train(model, PromptMaker(tokenizer), flags)
        record = {
            **origin(),
            "parameters": model.num_parameters(),
            "seconds": round(time.monotonic() - start),
            "curve": curve,
        }
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "passkey_model.json", record)


if __name__ == "__main__":
    main()
