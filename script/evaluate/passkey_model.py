"""Train a small Llama that finds pass keys up to a length and not beyond: shows that the measurement can see both.

    python script/evaluate/passkey_model.py --output output/passkey-model
    python script/evaluate/passkey.py --base_model output/passkey-model --lengths 64 128 256 512 1024 --depths 9

It reads nothing but prompts of component/evaluate/passkey.py, of random length and depth, short ones first. Its
tokenizer is made here too: words of the prompt, and digits one by one. Writes an ordinary model folder with
passkey_model.json.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from component.cli import exit_on_user_error
from component.error import UserError
from component.evaluate.passkey import FILLER, INTRODUCTION, KEYS, NEEDLE, QUESTION, PromptMaker
from component.storage.atomic import atomic_folder, check_target
from component.storage.result import origin, write_json
from script.shared.pretraining import build_model, train_tokenizer

WARMUP_STEPS = 50
EVERYTHING_ELSE = 0.05  # what a token that is no copy of the key weighs in the loss


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest prompt trained on (256)")
    parser.add_argument("--steps", type=int, default=700, help="steps (700)")
    parser.add_argument("--tokens_per_step", type=int, default=6144, help="tokens of all prompts of a step (6144)")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from the prompt's own lines; <s> stands before every text, digits stand alone."""
    texts = [INTRODUCTION, *FILLER, NEEDLE, QUESTION] * 2
    return train_tokenizer(texts, 512, None, split_digits=True, show_progress=False)


def batch(maker: PromptMaker, rows: int, length: int, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their answers, (rows, length + answer), and what each token weighs in the loss."""
    ids, weights = [], []
    for _ in range(rows):
        key = str(draw.choice(KEYS))
        prompt = maker.prompt(length, draw.random(), key)
        answer = maker.tokens_of(f" {key}.")
        weight = [EVERYTHING_ELSE] * length + [1.0] * len(answer)
        again = len(maker.tokens_of(f" {key} is the pass key."))  # the needle says the key twice
        start = prompt.needle_end - again
        weight[start : start + len(answer)] = [1.0] * len(answer)
        ids.append(prompt.ids + answer)
        weights.append(weight)
    return torch.tensor(ids), torch.tensor(weights)


def longest_now(step: int, steps: int, shortest: int, longest: int) -> int:
    """Short prompts first: copying is learnt at near distances, then stretched; full length from the middle on."""
    return round(shortest * (longest / shortest) ** min(1.0, 2.0 * step / steps))


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def train(model: LlamaForCausalLM, maker: PromptMaker, flags: argparse.Namespace) -> list[dict]:
    """Adam over `flags.steps` steps, learning rate up and then down along a cosine; the losses on the way."""
    shortest = len(maker.start) + len(maker.tokens_of(NEEDLE.format(key=KEYS[-1]))) + len(maker.question)
    if flags.length <= shortest:
        raise UserError(f"--length: {flags.length}; a prompt has more than {shortest} tokens")
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
    curve = train(model, PromptMaker(tokenizer), flags)
    record = {
        **origin(),
        "parameters": model.num_parameters(),
        "seconds": round(time.monotonic() - start),
        "curve": curve,
    }
    with atomic_folder(flags.output) as folder:
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "passkey_model.json", record)


if __name__ == "__main__":
    main()
