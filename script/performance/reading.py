"""How fast is a long document read and asked about, in how much memory, and what does each KV cache cost in quality?

    python script/performance/reading.py --tokenizer TOKENIZER --work WORK --memory_budget_gib 32 --output_json FILE
    python script/performance/reading.py --model_name_or_path MODEL --data_path FILE.bin --caches int8 int4 \\
        --tokens 120000 --output_json FILE

Without --model_name_or_path, random weights of LLaMA2's shape in WORK. A document of --tokens tokens, from --data_path
or random, is read as chat.py reads it; tokens are decoded behind it; then a second question is asked. The document's
last --scored tokens are scored 64 at a time, so that nearly all keys and values that they attend to are quantized. The
perplexity with --reference is measured first, without the cap of --memory_budget_gib.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import BOOLEAN, check_at_least, exit_on_user_error, new_parser, parsed_first
from component.inference.flags import CACHES
from script.shared.shape import SHAPES


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model_name_or_path", help="model to measure (default: random weights)")
    parser.add_argument("--size", choices=SHAPES, default="7b", help="shape of random weights (default 7b)")
    parser.add_argument("--tokenizer", help="folder with LLaMA2's tokenizer, for random weights")
    parser.add_argument("--work", type=Path, help="folder for random weights, kept for the next run")
    parser.add_argument("--load_in_4bit", **{**BOOLEAN, "default": True}, help="NF4 weights (default true)")
    parser.add_argument("--data_path", help=".bin file of token ids (default: random tokens)")
    parser.add_argument("--tokens", type=int, default=120_000, help="of the document (default 120000)")
    parser.add_argument("--scored", type=int, default=4096, help="last tokens for the perplexity (default 4096)")
    parser.add_argument("--new_tokens", type=int, default=64, help="decoded behind the document (default 64)")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens per forward pass of reading (default 4096)")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["int4"], help="to measure (default int4)")
    reference = "16-bit cache to compare perplexities with: dynamic, or offloaded if that does not fit (default)"
    parser.add_argument("--reference", choices=("dynamic", "offloaded"), default="offloaded", help=reference)
    parser.add_argument("--memory_budget_gib", type=float, help="cap on PyTorch's allocator (default none)")
    parser.add_argument("--output_json", required=True, help="file for the results")
    return parser.parse_args()


import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from component.data.token_file import read_tokens
from component.error import UserError
from component.inference.block_attention import NAME
from component.inference.cache_memory import Reading, need
from component.inference.generate import prefill
from component.inference.kv_cache import PromptCache
from component.inference.quantized_layer import BLOCK
from component.loading import free_memory, inference_config, load_model
from component.memory.budget import limit_memory
from component.rope import context_length
from component.storage.claim import held_result
from component.storage.result import origin, write_json
from script.shared.card import describe_card
from script.shared.random_model import make_model

QUESTION = 32  # tokens


def model_path(flags: argparse.Namespace) -> str:
    """The model to measure; random weights are made first, if they are not there."""
    if flags.model_name_or_path is not None:
        return flags.model_name_or_path
    if flags.tokenizer is None or flags.work is None:
        raise UserError("--model_name_or_path: missing; name it, or --tokenizer and --work for random weights")
    path = flags.work / f"llama-{flags.size}"
    if not (path / "config.json").is_file():
        make_model(flags.size, flags.tokenizer, path)
        free_memory()
    return str(path)


def load(path: str, flags: argparse.Namespace) -> PreTrainedModel:
    needed = flags.tokens + 2 * flags.new_tokens + QUESTION
    context = None if context_length(inference_config(path)) >= needed else needed
    return load_model(path, context_size=context, load_in_4bit=flags.load_in_4bit, attention=NAME)


def document(flags: argparse.Namespace, vocabulary: int) -> list[int]:
    """The document and a question, in token ids."""
    wanted = flags.tokens + QUESTION
    if flags.data_path is None:
        return np.random.default_rng(0).integers(3, vocabulary, wanted).tolist()
    tokens = read_tokens(flags.data_path, vocabulary)
    if len(tokens) < wanted:
        raise UserError(
            f"--data_path: {flags.data_path} has {len(tokens)} tokens; set --tokens {len(tokens) - QUESTION}"
        )
    return tokens[:wanted].tolist()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def answer(
    model: PreTrainedModel, cache: PromptCache, ids: list[int], new_tokens: int
) -> tuple[list[int], list[float]]:
    """`new_tokens` greedy tokens behind `ids`, and the seconds that each took, the first with the reading."""
    start, seconds = now(), list[float]()
    past, input_ids = cache.start(ids), torch.tensor([ids], device=model.device)
    prefill(model, input_ids, past, cache.chunk)
    step, found = input_ids[:, past.get_seq_length() :], []
    for _ in range(new_tokens):
        step = model(step, past_key_values=past, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(step))
        seconds.append(now() - start - sum(seconds))
    cache.finish(ids + found)
    return found, seconds


@torch.no_grad()
def last_loss(model: PreTrainedModel, cache: PromptCache, ids: list[int], scored: int) -> float:
    """Mean cross-entropy of the last `scored` tokens, in nats."""
    past, input_ids = cache.start(ids), torch.tensor([ids], device=model.device)
    first = len(ids) - scored - 1  # predicts the first of them
    prefill(model, input_ids[:, :first], past, cache.chunk)
    at, total = past.get_seq_length(), 0.0
    while at < len(ids) - 1:
        end = min(at + BLOCK, len(ids) - 1)
        logits = model(input_ids[:, at:end], past_key_values=past).logits[0].float()
        losses = cross_entropy(logits, input_ids[0, at + 1 : end + 1], reduction="none")
        total += float(losses[max(first - at, 0) :].sum())
        at = end
    return total / scored


def measure(model: PreTrainedModel, name: str, flags: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    cache = PromptCache(model.config, name, flags.chunk)
    text, question = ids[: flags.tokens], ids[flags.tokens :]
    start = now()
    first, seconds = answer(model, cache, text, flags.new_tokens)
    _, again = answer(model, cache, text + first + question, 1)
    found: dict[str, Any] = {
        "cache": name,
        "seconds_total": round(now() - start, 3),
        "seconds_to_first_token": round(seconds[0], 3),
        "seconds_to_first_token_of_second_question": round(again[0], 3),
        "tokens_per_second": round(len(seconds[2:]) / sum(seconds[2:]), 2),  # kernels are compiled in the first step
        "cache_gib": round(cache.nbytes / 2**30, 3),
    }
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        tokens = flags.tokens + flags.new_tokens + QUESTION
        estimate = need(Reading(model.config, flags.load_in_4bit, model.dtype.itemsize), name, tokens, flags.chunk)
        found["estimated_peak_gib"] = round(estimate.peak / 2**30, 2)
    return found


def perplexity(model: PreTrainedModel, name: str, flags: argparse.Namespace, ids: list[int]) -> float:
    free_memory()
    cache = PromptCache(model.config, name, flags.chunk)
    return math.exp(last_loss(model, cache, ids[: flags.tokens], flags.scored))


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_at_least(flags, BLOCK, "chunk")
    check_at_least(flags, 3, "new_tokens")
    check_at_least(flags, 1, "scored")
    if flags.chunk % BLOCK:
        raise UserError(f"--chunk: {flags.chunk} tokens; use a multiple of {BLOCK}")
    if flags.tokens < flags.scored + 2:
        raise UserError(f"--tokens: {flags.tokens}; use at least --scored + 2 = {flags.scored + 2}")
    with held_result(flags.output_json):
        path = model_path(flags)
        ids = document(flags, inference_config(path).vocab_size)
        model = load(path, flags)
        reference = flags.reference if torch.cuda.is_available() else "dynamic"
        exact = perplexity(model, reference, flags, ids)
        free_memory()
        limit_memory(flags.memory_budget_gib, "--memory_budget_gib")
        rows = []
        for name in flags.caches:
            found = measure(model, name, flags, ids)
            found["perplexity"] = perplexity(model, name, flags, ids)
            found["relative_perplexity"] = round(found["perplexity"] / exact, 5)
            rows.append(found)
            print(found, flush=True)
            settings = {"tokens": flags.tokens, "reference": {"cache": reference, "perplexity": exact}}
            write_json(flags.output_json, {**settings, "caches": rows, **describe_card(), **origin()})


if __name__ == "__main__":
    main()
