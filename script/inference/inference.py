"""Continue texts with an extended model: full attention, KV cache, streamed output.

    cd script/inference && python inference.py                        # the newest run; prompts typed line by line
    python script/inference/inference.py --prompt "Once upon a time"
    python script/inference/inference.py --prompt_file book.txt --max_new_tokens 200 --truncate left
    cat book.txt | python script/inference/inference.py --model_name_or_path MODEL
    python script/inference/inference.py --input_jsonl prompts.jsonl --output_jsonl answers.jsonl

Standard input that is not a terminal is one prompt; only the generated text goes to standard output. Each line of a
JSONL file has a "prompt" (or "text", or "input"); the output adds its "completion". A restarted run continues after
the last complete line, with the same settings.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import check_at_least, exit_on_user_error, parsed_first, show
from component.inference.flags import generation_parser


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = generation_parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt_file", help="a text file or a PDF to continue")
    source.add_argument("--input_jsonl", help="many prompts, one JSON object per line")
    parser.add_argument("--output_jsonl", help="file for their completions")
    batch = "prompts of --input_jsonl to answer at once (default 1)"
    parser.add_argument("--batch_size", type=int, default=1, help=batch)
    return parser.parse_args()


from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.data.text import text_ids
from component.error import UserError
from component.inference.batch import batch_ids, check_batch
from component.inference.context import describe_context, free_context, truncate_prompt
from component.inference.generate import Stopped, answer_text, cache_from_flags, stream_generation
from component.inference.load import fit_cache_to, load_from_flags, named_model
from component.inference.prompt_file import Record, answer_all, count_answered, held_output, read_prompts
from component.inference.quantized_layer import FORMATS
from component.inference.terminal import line_editing, prompts, read_input
from component.inference.text_file import read_text_file
from component.loading import inference_config, resolve_model, trained_hash
from component.storage.fingerprint import fingerprint

# whatever an answer depends on, besides the model
ANSWER_SETTINGS = (
    *("load_in_4bit", "context_size", "attn_implementation", "cache_implementation", "truncate", "max_new_tokens"),
    *("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"),
)


def check_flags(flags: argparse.Namespace) -> None:
    if (flags.input_jsonl is None) != (flags.output_jsonl is None):
        raise UserError("--input_jsonl and --output_jsonl belong together; give both or none")
    check_at_least(flags, 1, "batch_size")
    if flags.prompt is not None and not flags.prompt.strip():
        raise UserError("--prompt: it is blank; write a text to continue")
    if flags.batch_size > 1 and flags.input_jsonl is None:
        raise UserError(f"--batch_size: {flags.batch_size}, but there is no --input_jsonl; give both or none")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def continue_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, flags: argparse.Namespace
) -> None:
    prompt_ids = truncate_prompt(model, text_ids(tokenizer, prompt, add_special_tokens=True), flags)
    say(describe_context(model, len(prompt_ids)))
    cache = cache_from_flags(model, flags)
    stream_generation(model, tokenizer, prompt_ids, flags, cache)
    say(describe_context(model, cache.used_tokens, cache))


def continue_file(flags: argparse.Namespace) -> None:
    requests = read_prompts(flags.input_jsonl)
    if requests:
        fit_cache_to(flags, [prompt for prompt, _ in requests], flags.batch_size)
        check_batch(inference_config(*named_model(flags), context_size=flags.context_size), flags)
    names = dict(zip(("model_name_or_path", "adapter_name_or_path"), named_model(flags), strict=True))
    read = {"--input_jsonl": [flags.input_jsonl], **{f"--{name}": [path] for name, path in names.items()}}
    settings = {name: getattr(flags, name) for name in ANSWER_SETTINGS}
    if flags.cache_implementation in FORMATS:  # tokens of one forward pass attend to each other as computed
        settings["prefill_tokens"] = flags.prefill_tokens
    settings["adapter_sha256"] = trained_hash(*named_model(flags))
    origin = resolve_model(*named_model(flags))
    settings |= {"base_fingerprint": fingerprint(origin.base), "adapter_fingerprint": fingerprint(origin.adapter)}
    # a folder is the same one from wherever its name is given
    names = {name: str(Path(path).resolve()) if path and Path(path).exists() else path for name, path in names.items()}
    with held_output(flags.output_jsonl, read, names | settings):
        answer_file(*load_from_flags(flags), requests, flags)


def answer_file(
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

    def answer(numbers: range) -> list[Record]:
        batch = [prompt_ids[number] for number in numbers]
        seeds = [flags.seed + number for number in numbers]  # the same however often the run is resumed
        answers = batch_ids(model, tokenizer, batch, seeds, flags)
        texts = [answer_text(tokenizer, ids, flags.stop or ()) for ids in answers]
        return [
            {"completion": text, "prompt_tokens": len(asked), "completion_tokens": len(ids)}  # as generated
            for asked, ids, text in zip(batch, answers, texts, strict=True)
        ]

    answer_all(flags.output_jsonl, records, start, answer, flags.batch_size)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_flags(flags)
    if flags.input_jsonl:
        continue_file(flags)
        return
    text = flags.prompt if flags.prompt_file is None else read_text_file(flags.prompt_file, "--prompt_file")
    if text is not None:
        fit_cache_to(flags, [text])
    model, tokenizer = load_from_flags(flags)
    if text is None:
        text = read_input()
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
                show(f"error: {error}")


if __name__ == "__main__":
    main()
