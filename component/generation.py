"""How is text continued? Flags, the choice of model, and one streamed generation, shared by inference and chat."""

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from component.checkpoint import RECORD_FILE, merged_folder, newest_run, read_record
from component.error import UserError
from component.model import load_for_inference
from component.rope import context_length


def boolean(text: str) -> bool:
    """For flags that take `True` and `False`, as the original's evaluation does, and also stand alone."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def generation_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    newest = "default: the newest finished run under output/"
    parser.add_argument(
        "--model_name_or_path", help=f"plain or merged model, or the adapter's base ({newest}, merged)"
    )
    parser.add_argument("--adapter_name_or_path", help=f"adapter folder or hub id ({newest}, if it is not merged)")
    flag: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True}
    parser.add_argument("--load_in_4bit", **flag, default=False, help="NF4 weights: a quarter of the memory")
    parser.add_argument("--context_size", type=int, help="tokens a base is stretched to; our own folders know theirs")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens to generate at most (500)")
    parser.add_argument("--temperature", type=float, default=0.35, help="of sampling (0.35)")
    parser.add_argument("--top_p", type=float, default=0.9, help="share of the probability that is sampled from (0.9)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repeating (1.0)")
    parser.add_argument("--do_sample", **flag, default=True, help="false takes the likeliest token each time (true)")
    parser.add_argument("--seed", type=int, default=42, help="of sampling (42)")
    return parser


def check_sampling(flags: argparse.Namespace) -> None:
    bounds = {
        "max_new_tokens": (flags.max_new_tokens >= 1, "at least 1"),
        "temperature": (flags.temperature > 0, "a number above 0; for the likeliest tokens --do_sample false"),
        "top_p": (0 < flags.top_p <= 1, "a share in (0, 1]"),
        "repetition_penalty": (flags.repetition_penalty > 0, "a number above 0, 1 for none"),
        "seed": (0 <= flags.seed < 2**32, "0 or more, below 2**32"),
        "context_size": (flags.context_size is None or flags.context_size >= 1, "at least 1 token"),
    }
    for name, (is_sane, cure) in bounds.items():
        if not is_sane:
            raise UserError(f"--{name}: {getattr(flags, name)}; use {cure}")


def load_from_flags(flags: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the flags name, or the newest finished run: merged if it has been, else base and adapter."""
    check_sampling(flags)
    model_path, adapter = flags.model_name_or_path, flags.adapter_name_or_path
    if model_path is None and adapter is None:
        run = newest_run()
        merged = merged_folder(run)
        model_path, adapter = (str(merged), None) if _is_merged(run, merged) else (None, str(run))
    print(f"model: {model_path or 'the base of'} {adapter or ''}".rstrip(), file=sys.stderr, flush=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of positions beyond the unstretched length
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # under LANG=C broken bytes would pass, and end in the tokenizer
    set_seed(flags.seed)
    return load_for_inference(model_path, adapter, context_size=flags.context_size, load_in_4bit=flags.load_in_4bit)


def recorded_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the model was taught to chat: as the record beside its tokenizer says; Vicuna's way where there is none."""
    record = read_record(tokenizer.name_or_path) or {}
    return record.get("template") or "vicuna"


def _is_merged(run: Path, merged: Path) -> bool:
    """Whether `merged` was made from `run` as it is now, not from an earlier training under the same name."""
    record = merged / RECORD_FILE
    if not record.is_file():
        return merged.is_dir()
    return record.stat().st_mtime >= (run / RECORD_FILE).stat().st_mtime


def prompts(banner: str):
    """Lines typed at a terminal after `banner`; until the end of input or /exit.

    Raises:
        UserError: a line that is no text.
    """
    while True:
        try:
            with readable_input():
                line = input(banner)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line


def stream_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], flags: argparse.Namespace
) -> str:
    """Print the continuation of `prompt_ids` as it is generated; returns it.

    Raises:
        UserError: the prompt leaves no room in the model's context.
    """
    context = context_length(model.config)
    room = context - len(prompt_ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, the model's context {context}; shorten the prompt"
            " or use a model that was extended further"
        )
    sampling = {"temperature": flags.temperature, "top_p": flags.top_p} if flags.do_sample else {}
    config = GenerationConfig(
        max_new_tokens=min(flags.max_new_tokens, room),
        do_sample=flags.do_sample,
        repetition_penalty=flags.repetition_penalty,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    input_ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)


def greedy_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    offload_cache: bool = False,
) -> list[int]:
    """The likeliest next tokens of `prompt_ids`, without the prompt; beyond the model's context too.

    Args:
        offload_cache: keys and values of all layers but one wait in host memory.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        cache_implementation="offloaded" if offload_cache else None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    input_ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    output = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return output[0, len(prompt_ids) :].tolist()


def describe_context(model: PreTrainedModel, used: int) -> str:
    context = context_length(model.config)
    return f"{used} of {context} tokens of context used ({used / context:.0%})"


def read_prompt(path: str | None) -> str | None:
    """A text file's contents, or all of standard input when that is not a terminal; None to ask at the terminal."""
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"--prompt_file: there is no file {path}; name a text file")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file: {path} is not UTF-8 ({error.reason}); convert it") from error
    if sys.stdin.isatty():
        return None
    with readable_input():
        return sys.stdin.read()


@contextlib.contextmanager
def readable_input() -> Iterator[None]:
    """A message for the user who sends bytes that are no text."""
    try:
        yield
    except UnicodeDecodeError as error:
        spelling = error.encoding.upper()
        raise UserError(f"standard input: no {spelling} text ({error.reason}); convert it") from error
