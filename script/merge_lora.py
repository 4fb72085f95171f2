"""Merge an adapter into its base: a plain model folder with tokenizer and extended config.

    cd script && python merge_lora.py                                 # the newest finished run under output/
    python script/merge_lora.py --adapter_name_or_path output/RUN --save_path MODEL --dtype bfloat16
    python script/merge_lora.py --adapter_name_or_path output/RUN --save_path MODEL --check only

Tensors are read, changed and written one at a time. Then the result is compared with the adapter on its base, also a
tensor at a time.
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.cli import exit_on_user_error, new_parser, parsed_first
from component.merge import BASES, CHECKS


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model_name_or_path", help="base model (default: the one that the adapter records)")
    parser.add_argument("--adapter_name_or_path", help="adapter folder (default: the newest finished run)")
    parser.add_argument("--save_path", help="folder to write (default: the adapter's, with -merged added)")
    parser.add_argument("--context_size", type=int, help="context in tokens, for adapters that do not record it")
    dtype = "dtype of the result (default float16)"
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"], help=dtype)
    nf4 = "what the adapter is added to: the base's own weights (fp16), or dequantized as in 4-bit training (nf4)"
    parser.add_argument("--base", default="fp16", choices=BASES, help=nf4)
    parser.add_argument("--max_shard_size", default="5GB", help="size of a weight file (default 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing merged model")
    check = (
        "compare with the adapter on its base, tensor by tensor (auto, yes), or not (no), or an existing model (only)"
    )
    parser.add_argument("--check", nargs="?", const="yes", default="auto", choices=CHECKS, help=check)
    renew = "rewrite config.json of an existing merged model as other engines need it; no weights are touched"
    parser.add_argument("--renew_config", action="store_true", help=renew)
    measure = "file of token ids, or its hub id: perplexity of the adapter on its base and of both kinds of merge"
    parser.add_argument("--measure", metavar="FILE.bin", help=measure)
    parser.add_argument("--seq_len", type=int, help="tokens per window of --measure (default: the extended context)")
    return parser.parse_args()


import numpy as np
import torch
from transformers import PretrainedConfig

from component.adapter import adapter_hash
from component.card.write import write_card
from component.checkpoint import check_replaceable, merged_folder, newest_run, read_record, write_record
from component.data.chat_template import answer_end
from component.data.token_file import read_tokens
from component.error import UserError
from component.evaluate.model_spec import local_tokens
from component.evaluate.perplexity import check_measure, longlora_windows, measure_all
from component.evaluate.table import comparison
from component.loading import extended_config_of, load_model, resolve_model
from component.merge.check import check_merged
from component.merge.plan import plan_merge
from component.merge.serving import problems_elsewhere, renew_config, served_config
from component.merge.write import variants_on_disk, write_merged
from component.model import load_config
from component.rope import context_length, rope_factor
from component.storage.atomic import atomic_folder, check_target
from component.storage.claim import claimed
from component.storage.tensor_writer import shard_bytes
from component.tokenizer import load_tokenizer, save_tokenizer

VICUNA = Path(__file__).resolve().parent / "inference/vicuna.jinja"
FROZEN = (
    "dynamic positions are frozen as they are for {} tokens, which every engine computes alike; "
    "texts much shorter than that are predicted slightly worse"
)


def measured_tokens(flags: argparse.Namespace, config: PretrainedConfig) -> tuple[np.ndarray, int]:
    """The tokens of --measure and the window length; too short a file is refused before anything is merged."""
    file = local_tokens(flags.measure, "--measure")
    tokens, seq_len = read_tokens(file, config.vocab_size, "--measure"), flags.seq_len or context_length(config)
    check_measure("longlora", seq_len, seq_len, 1, 0)
    if not longlora_windows(len(tokens), seq_len, seq_len):
        raise UserError(
            f"--measure: {flags.measure} has {len(tokens)} tokens, and windows of {seq_len} need {2 * seq_len + 1}; "
            "set a shorter --seq_len or name a longer file"
        )
    return tokens, seq_len


def check_flags(flags: argparse.Namespace, target: Path, base: str, adapter: Path) -> None:
    """Refuse a target that must not be written, or that --check only does not find."""
    if flags.check == "only":
        if not (target / "config.json").is_file():
            raise UserError(f"--save_path: there is no model {target} to check; merge first, without --check only")
        return
    check_target(target, "--save_path", flags.overwrite)
    if target.exists():
        check_replaceable(target, "--save_path")
    for source in (Path(base), adapter):
        if source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"--save_path: {target} is, or holds, the input {source}; name another folder")


def foreign_record(base: str, config: PretrainedConfig) -> dict:
    """What is known of a merge whose adapter has no record: another project's."""
    scaling = {"rope_type": config.rope_parameters["rope_type"], "rope_factor": rope_factor(config)}
    place = str(Path(base).resolve()) if Path(base).is_dir() else base
    return {"base_model": place, "context_tokens": context_length(config), **scaling}


def flags_to_check(flags: argparse.Namespace, adapter: Path, target: Path) -> str:
    """The flags of a command that checks this merge later."""
    given = {"model_name_or_path": flags.model_name_or_path, "adapter_name_or_path": adapter, "save_path": target}
    given |= {"context_size": flags.context_size, "dtype": flags.dtype, "base": flags.base}
    return shlex.join(word for name, value in given.items() if value for word in (f"--{name}", str(value)))


def tell_problems_elsewhere(target: Path) -> None:
    if problems := problems_elsewhere(target, load_config(str(target), "save_path")):
        cure = f"python script/merge_lora.py --save_path {target} --renew_config"
        print(f"{target}: in other engines: {'; '.join(problems)}; to renew its config: {cure}", file=sys.stderr)


def renew(target: Path) -> None:
    check_replaceable(target, "--save_path")
    config, record = load_config(str(target), "save_path"), read_record(target)
    problems = problems_elsewhere(target, config)
    with claimed({"--save_path": [target / "config.json"]}, {}, overwrite=True):
        renew_config(target, config)
        if record is not None:
            write_record(target, record)  # it has the sizes of all files
            write_card(target)
    print(f"{target}: {'; '.join(problems) or 'nothing was wrong'}; config renewed, weights untouched")


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    if flags.renew_config and flags.save_path:
        return renew(Path(flags.save_path))
    adapter = Path(flags.adapter_name_or_path) if flags.adapter_name_or_path else newest_run()
    target = Path(flags.save_path) if flags.save_path else merged_folder(adapter)
    if flags.renew_config:
        return renew(target)
    base, source, is_ours, _ = resolve_model(flags.model_name_or_path, str(adapter))
    check_flags(flags, target, base, adapter)
    max_shard_bytes = shard_bytes(flags.max_shard_size)
    config, tokenizer = extended_config_of(source, flags.context_size, is_fixed=is_ours), load_tokenizer(source)
    tokens, seq_len = measured_tokens(flags, config) if flags.measure else (None, 0)
    kinds = BASES if flags.measure else (flags.base,)
    plans = {
        kind: plan_merge(base, str(adapter), config, dtype=getattr(torch, flags.dtype), base_weights=kind)
        for kind in kinds
    }
    plan = plans[flags.base]
    load_adapted = {
        kind: partial(load_model, base, str(adapter), context_size=flags.context_size, load_in_4bit=kind == "nf4")
        for kind in kinds
    }
    later = (
        f"on a larger machine run: python script/merge_lora.py {flags_to_check(flags, adapter, target)} --check only"
    )
    check = partial(
        check_merged, plan=plan, adapter=str(adapter), config=served_config(config), tokenizer=tokenizer,
        load_adapted=load_adapted[flags.base], hint_if_skipped=later if flags.check == "auto" else None,
    )  # fmt: skip

    if flags.check == "only":
        tell_problems_elsewhere(target)
        check(target)
        return
    link = f", a link to {target.resolve()}" if target.is_symlink() else ""
    print(f"merging {adapter} into {target}{link}", file=sys.stderr, flush=True)
    record = read_record(adapter)
    if record and record.get("template") == "vicuna":
        tokenizer.chat_template = VICUNA.read_text(encoding="utf-8")  # servers ask as training did
    elif record and record.get("template") == "tokenizer":
        plan.add_end(answer_end(tokenizer))
    if config.rope_parameters["rope_type"] == "dynamic":
        print(FROZEN.format(context_length(config)), file=sys.stderr, flush=True)
    with atomic_folder(target, flags.overwrite) as folder:
        save_tokenizer(folder, tokenizer, (source, base))
        write_merged(folder, plan, max_shard_bytes=max_shard_bytes)
        if flags.check != "no":
            check(folder)
        if tokens is not None:
            with variants_on_disk(folder, plans, flags.base) as merged:
                models = {f"adapter on {kind}": load for kind, load in load_adapted.items()}
                models |= {f"merged into {kind}": partial(load_model, str(merged[kind])) for kind in kinds}
                print(comparison(measure_all(models, tokens, seq_len, plan.config.dtype)), flush=True)
        place = str(adapter.resolve() if adapter.is_dir() else adapter)
        merged_from = {"merged_from": place, "merged_sha256": adapter_hash(str(adapter))}
        merged_from |= {"base_weights": flags.base, "dtype": flags.dtype}
        write_record(folder, {**(record or foreign_record(base, config)), **merged_from})
        write_card(folder, target.absolute().name)
    print(f"{target}: merged model, {plan.parameters:,} parameters in {flags.dtype}")


if __name__ == "__main__":
    main()
