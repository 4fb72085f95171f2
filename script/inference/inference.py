"""Continue texts with an extended model: full attention, KV cache, streamed output.

    cd script/inference && python inference.py                        # the newest run; prompts typed line by line
    python script/inference/inference.py --prompt "Once upon a time"
    python script/inference/inference.py --prompt_file book.txt --max_new_tokens 200 --truncate left
    cat book.txt | python script/inference/inference.py --model_name_or_path MODEL
    python script/inference/inference.py --input_jsonl prompts.jsonl --output_jsonl answers.jsonl

Standard input that is not a terminal is one prompt; only the generated text goes to standard output. Each line of a
JSONL file has a "prompt" (or "text", or "input"); the output adds its "completion". A restarted run continues after
the last complete line.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from component.cli import exit_on_user_error
from component.data.record import text_problem
from component.data.text import text_ids
from component.error import UserError
from component.inference.context import describe_context, free_context, truncate_prompt
from component.inference.flags import generation_parser, load_from_flags
from component.inference.generate import Stopped, generate, stream_generation
from component.inference.kv_cache import PromptCache
from component.inference.prompt_file import Record, answer_all, count_answered, read_prompts
from component.inference.terminal import line_editing, prompts, read_prompt


def parse() -> argparse.Namespace:
    parser = generation_parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt_file", help="a text file or a PDF to continue")
    source.add_argument("--input_jsonl", help="many prompts, one JSON object per line")
    parser.add_argument("--output_jsonl", help="file for their completions")
    flags = parser.parse_args()
    if (flags.input_jsonl is None) != (flags.output_jsonl is None):
        raise UserError("--input_jsonl and --output_jsonl belong together; give both or none")
    if flags.prompt is not None and (problem := text_problem(flags.prompt)):  # bytes that are no UTF-8
        raise UserError(f"--prompt {problem}")
    return flags


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def continue_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, flags: argparse.Namespace
) -> None:
    prompt_ids = truncate_prompt(model, text_ids(tokenizer, prompt, add_special_tokens=True), flags)
    say(describe_context(model, len(prompt_ids)))
    cache = PromptCache(model.config, flags.cache_implementation)
    answer = stream_generation(model, tokenizer, prompt_ids, flags, cache)
    used = len(prompt_ids) + len(tokenizer(answer, add_special_tokens=False).input_ids)
    say(describe_context(model, used, cache))


def continue_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[tuple[str, Record]],
    flags: argparse.Namespace,
) -> None:
    records = [record for _, record in requests]
    start = count_answered(flags.output_jsonl, records)
    encoded = (text_ids(tokenizer, prompt, add_special_tokens=True) for prompt, _ in requests)
    prompt_ids = [truncate_prompt(model, ids, flags) for ids in encoded]
    for number, ids in enumerate(prompt_ids, 1):
        free_context(model, ids, f"{flags.input_jsonl}: prompt {number}")

    def answer(number: int) -> Record:
        set_seed(flags.seed + number)  # a resumed run samples what an uninterrupted one would
        text = generate(model, tokenizer, prompt_ids[number], flags, lambda piece: None)
        tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
        return {"completion": text, "prompt_tokens": len(prompt_ids[number]), "completion_tokens": tokens}

    answer_all(flags.output_jsonl, records, start, answer)


@exit_on_user_error
def main() -> None:
    flags = parse()
    requests = read_prompts(flags.input_jsonl) if flags.input_jsonl else []
    model, tokenizer = load_from_flags(flags)
    if flags.input_jsonl:
        continue_file(model, tokenizer, requests, flags)
        return
    text = flags.prompt if flags.prompt is not None else read_prompt(flags.prompt_file)
    if text is not None:
        if text.strip():
            continue_one(model, tokenizer, text, flags)
        return
    with line_editing():
        for prompt in prompts("Input: "):
            try:
                continue_one(model, tokenizer, prompt, flags)
            except Stopped:
                say("(stopped)")
            except UserError as error:
                say(f"error: {error}")


if __name__ == "__main__":
    main()
