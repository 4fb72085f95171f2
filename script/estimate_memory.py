"""Does training or inference fit on a GPU, how long may texts be, and how long does training take?

Needs only the model's config.

python script/estimate_memory.py --model_name_or_path NousResearch/Llama-2-7b-hf --max_seq_length 32768
python script/estimate_memory.py --model_name_or_path M --max_seq_length 8192 --lora_rank 16 --memory_budget_gib 16
python script/estimate_memory.py --model_name_or_path M --max_seq_length 1048576 --sequence_parallel_size 8
python script/estimate_memory.py --model_name_or_path M --max_seq_length 32768 --card rtx4090 --memory_budget_gib 21
python script/estimate_memory.py --model_name_or_path M --inference --context 120000 --load_in_4bit
"""

import argparse
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from component.cli import BOOLEAN, exit_on_user_error, new_parser, parsed_first
from component.train.argument import FLOAT8, MATMULS


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="folder with a config.json, or a hub id")
    parser.add_argument("--max_seq_length", type=int, help="tokens per sample; required for training")
    inference = "estimate the memory of inference.py, chat.py and web.py with each KV cache instead"
    parser.add_argument("--inference", action="store_true", help=inference)
    context = "with --inference: tokens of the longest text, answer included (default: the model's context)"
    parser.add_argument("--context", type=int, help=context)
    parser.add_argument("--load_in_4bit", **BOOLEAN, help="with --inference: NF4 weights")
    parser.add_argument("--memory_budget_gib", type=float, default=32, help="GPU memory for tensors (default 32)")
    parser.add_argument("--host_gib", type=float, default=64, help="CPU memory to pin, per GPU (default 64)")
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--sequence_parallel_size", type=int, default=1, help="GPUs over which each row is split")
    parser.add_argument("--data_parallel_size", type=int, default=1, help="GPUs, or groups of them, with other rows")
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--target_modules", help="comma-separated names (default: all linear layers but lm_head)")
    parser.add_argument("--train_embedding", action="store_true")
    parser.add_argument("--train_norm", action="store_true")
    parser.add_argument("--group_size_ratio", type=float, default=0.25, help="of S2-Attn; 1 for full attention")
    parser.add_argument("--full_attention_ratio", type=float, default=0, help="share of steps with full attention")
    parser.add_argument("--max_steps", type=int, default=1000, help="optimizer steps, to tell hours (default 1000)")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--card", help="card to estimate time on, e.g. h100, rtx4090, t4; default: this GPU, if any")
    parser.add_argument("--no_4bit", action="store_true", help="16-bit base weights")
    products = "products with frozen weights, as in train.py's YAML (auto, for --card or this GPU)"
    parser.add_argument("--frozen_matmul", choices=MATMULS, default="auto", help=products)
    parser.add_argument("--cuda_graph", action="store_true", help="as the key of train.py, for the time of a step")
    parser.add_argument("--no_liger", action="store_true", help="without Liger's kernels, as on a V100")
    parser.add_argument("--optim", default="paged_adamw_32bit")
    zero_2 = str(ROOT / "train_args/deepspeed/deepspeed_config_s2.json")
    parser.add_argument("--deepspeed", default=zero_2, help="DeepSpeed config file (default ZeRO-2), or none")
    parser.add_argument("--output_json", type=Path, help="also write the estimate here")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    flags = parser.parse_args()
    flags.given = {name: value for name, value in vars(flags).items() if value != parser.get_default(name)}
    return flags


import torch
from transformers import PretrainedConfig

from component.adapter import check_targets_early
from component.attention.interface import has_plain_attention
from component.distributed.strategy import training_strategy
from component.error import UserError
from component.evaluate.table import grid
from component.float8.product import FAST_FROM, is_fast
from component.inference.cache_memory import EXACT, Reading, best_chunk, fits, least_need, longest_context
from component.inference.flags import CACHES
from component.inference.kv_cache import is_quantizable
from component.memory.budget import CONTEXT_GIB, LIBRARIES_GIB, USABLE, most_tokens
from component.memory.cost import checkpoint_bytes, describe_time
from component.memory.layer import supports_layers_of
from component.memory.plan import MemoryPlan, choose_plan, estimate, minimum_memory_plan, next_memory_option
from component.memory.rate import measured_rate, published_rate
from component.memory.workload import GIB, Workload, paged_bytes, workload
from component.model import load_config, stored_quantization
from component.rope import context_length
from component.storage.claim import claimed
from component.storage.result import write_json
from component.train.model_check import check_float8
from component.train.validation import out_of_bounds

PARTS = ("weights", "cache", "workspace", "peak", "host")  # of inference; host: CPU memory
OF_INFERENCE = ("context", "load_in_4bit")
OF_BOTH = ("model_name_or_path", "inference", "memory_budget_gib", "host_gib", "output_json", "overwrite")


def check_kind(flags: argparse.Namespace) -> None:
    """Refuse flags of training with those of inference."""
    named = [name for name in flags.given if (name in OF_INFERENCE) != flags.inference and name not in OF_BOTH]
    if named and not flags.inference:
        raise UserError(f"--{named[0]}: {flags.given[named[0]]}, but no --inference; add it, or leave this out")
    if named:
        cure = "use --context" if named[0] == "max_seq_length" else "leave it out"
        raise UserError(f"--{named[0]}: {flags.given[named[0]]} is for training; with --inference {cure}")
    if not flags.inference and flags.max_seq_length is None:
        raise UserError("--max_seq_length: missing; name the tokens per sample, or estimate with --inference")


def check_model(flags: argparse.Namespace, config: PretrainedConfig) -> None:
    """Refuse what train.py refuses for models of this type, and say what it trains in another way."""
    if flags.frozen_matmul in FLOAT8:
        check_float8(config, f"--frozen_matmul {flags.frozen_matmul}", "leave it out")
    if flags.sequence_parallel_size > 1 and not has_plain_attention(config, flags.max_seq_length):
        raise UserError(
            f"--sequence_parallel_size: {flags.sequence_parallel_size}, but {config.model_type}'s own attention over "
            f"rows of {flags.max_seq_length} tokens is not split over processes; leave it out"
        )
    if not supports_layers_of(config):
        print(f"no memory plan supports {config.model_type}: train.py runs Hugging Face's layers, not as estimated")


def chosen_matmul(flags: argparse.Namespace, config: PretrainedConfig) -> str:
    """`frozen_matmul` as train.py would choose it, in bf16, on --card or on this GPU."""
    if flags.frozen_matmul != "auto":
        return flags.frozen_matmul
    if flags.card:
        is_fast_here = config.hidden_size >= FAST_FROM and published_rate(flags.card).float8 > 0
    else:
        is_fast_here = torch.cuda.is_available() and is_fast(config.hidden_size, torch.device("cuda"))
    return "fp8_backward" if is_fast_here and supports_layers_of(config) else "unquantized"


def check_memory(flags: argparse.Namespace) -> None:
    for name in ("memory_budget_gib", "host_gib"):
        if not 0 <= getattr(flags, name) < math.inf:  # NaN too; texts of any length fit into infinite memory
            raise UserError(f"--{name}: {getattr(flags, name):g}; use 0 or more, and a finite number")


def read_workload(flags: argparse.Namespace) -> Workload:
    if problems := out_of_bounds(vars(flags)):
        raise UserError("; ".join(f"--{problem}" for problem in problems))
    check_memory(flags)
    config = load_config(flags.model_name_or_path)
    targets = flags.target_modules.split(",") if flags.target_modules else None
    check_targets_early(config, targets)
    check_model(flags, config)
    if flags.deepspeed not in (None, "none") and not Path(flags.deepspeed).is_file():
        raise UserError(f"--deepspeed: there is no file {flags.deepspeed}; use one of train_args/deepspeed/, or none")
    parts, rows = flags.sequence_parallel_size, flags.per_device_train_batch_size
    if flags.data_parallel_size < 1:
        raise UserError(f"--data_parallel_size: {flags.data_parallel_size}; use 1 or more")
    if parts > flags.max_seq_length:
        raise UserError(f"--sequence_parallel_size: {parts} GPUs for rows of {flags.max_seq_length} tokens; use fewer")
    processes = parts * flags.data_parallel_size
    strategy = training_strategy(None if flags.deepspeed == "none" else flags.deepspeed, processes, parts)
    return workload(
        config,
        target_names=targets,
        rank=flags.lora_rank,
        train_embedding=flags.train_embedding,
        train_norm=flags.train_norm,
        tokens=rows * -(-flags.max_seq_length // parts),
        group=int(flags.group_size_ratio * flags.max_seq_length),
        in_4bit=not flags.no_4bit,
        in_float8=(matmul := chosen_matmul(flags, config)) in FLOAT8,
        float8_forward=matmul == "fp8",
        fused=not flags.no_liger,
        optimizer=flags.optim,
        zero=strategy.zero_stage is not None,
        offload_optimizer=strategy.offloads_optimizer,
        processes=processes,
        sequence_processes=parts,
        shards=strategy.shards,
        rows=rows,
        full_steps=flags.group_size_ratio >= 1 or flags.full_attention_ratio > 0,
    )


def longest(work: Workload, budget_gib: float, host_gib: float) -> int:
    """The largest number of tokens of a micro-batch, on each GPU, for which the minimum-memory plan fits."""
    share = work.group / work.tokens

    def fits(tokens: int) -> bool:
        found = estimate(replace(work, tokens=tokens, group=int(share * tokens)), minimum_memory_plan())
        return found.peak_gib <= budget_gib and found.host_gib <= host_gib

    return most_tokens(fits)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    deepspeed = None if flags.deepspeed == "none" else flags.deepspeed
    read = {"--model_name_or_path": [flags.model_name_or_path], "--deepspeed": [deepspeed]}
    check_kind(flags)
    with claimed({"--output_json": [flags.output_json]}, read, overwrite=flags.overwrite):
        show_inference(flags) if flags.inference else show_estimate(flags)


def show_inference(flags: argparse.Namespace) -> None:
    """Print which KV caches fit, and how long texts may be with each."""
    check_memory(flags)
    config = load_config(flags.model_name_or_path)
    tokens = context_length(config) if flags.context is None else flags.context
    if tokens < 1:
        raise UserError(f"--context: {tokens} tokens; use at least 1")
    in_4bit = bool(flags.load_in_4bit or stored_quantization(flags.model_name_or_path))
    reading, rows = Reading(config, in_4bit), []
    available, host = USABLE * flags.memory_budget_gib * GIB, flags.host_gib * GIB
    names = CACHES if is_quantizable(config) else EXACT
    for name in names:
        found = best_chunk(reading, name, tokens, available, host) or least_need(reading, name, tokens)
        sizes = {f"{part}_gib": getattr(found, part) / GIB for part in PARTS}
        longest = longest_context(reading, name, available, host)
        rows.append({"cache": name, **sizes, "fits": fits(found, available, host), "longest_tokens": longest})
    print(f"{tokens} tokens in {flags.memory_budget_gib:g} GiB of GPU and {flags.host_gib:g} GiB of CPU memory")
    cells = []
    for row in rows:
        gib = [f"{row[f'{part}_gib']:.1f}" for part in PARTS]
        cells.append([row["cache"], *gib, "yes" if row["fits"] else "no", str(row["longest_tokens"])])
    print(grid(["cache", *(f"{part} GiB" for part in PARTS), "fits", "longest context"], cells))
    if names == EXACT:
        print("The model has sliding windows: its keys and values cannot be quantized.")
    if flags.output_json:
        write_json(flags.output_json, {"tokens": tokens, "load_in_4bit": in_4bit, "caches": rows})


def estimated_time(flags: argparse.Namespace, work: Workload, plan: MemoryPlan) -> dict[str, float]:
    """Print seconds of a step and hours, if the card is known; returns them by name."""
    dtype, device = torch.float16 if flags.no_liger else torch.bfloat16, torch.device("cuda")
    if not (flags.card or torch.cuda.is_available()):
        return {}
    rate = published_rate(flags.card) if flags.card else measured_rate(work, device, dtype)
    if rate is None or (work.in_float8 and not rate.float8):
        return {}
    label = f"{flags.card}, from its published rates" if flags.card else "this GPU"
    text, found = describe_time(
        work,
        plan,
        rate,
        steps=flags.max_steps,
        micro_batches=flags.gradient_accumulation_steps,
        is_full=flags.group_size_ratio >= 1,
        full_ratio=flags.full_attention_ratio,
        cuda_graph=flags.cuda_graph,
    )
    print(f"  time on {label}: {text}")
    return found


def fitting(flags: argparse.Namespace, work: Workload, budget_gib: float) -> Workload:
    """`work`, without FP8 if `auto` chose it and it does not fit, as train.py does; says what `auto` means."""
    if flags.frozen_matmul != "auto":
        return work
    if work.in_float8 and choose_plan(work, budget_gib, flags.host_gib)[1].peak_gib > budget_gib:
        return replace(work, in_float8=False)
    if work.in_float8:
        print(f"frozen_matmul: fp8_backward, as train.py chooses on {flags.card or 'this GPU'} with bf16: true")
    elif not (flags.card or torch.cuda.is_available()) and work.hidden >= FAST_FROM:
        print("frozen_matmul: unquantized; an Ada, Hopper or Blackwell GPU has another default, see --card")
    return work


def show_estimate(flags: argparse.Namespace) -> None:
    if flags.card is not None:
        rate = published_rate(flags.card)  # a wrong name is told first
        if flags.frozen_matmul in FLOAT8 and not rate.float8:
            cure = "leave it out, or name an Ada, Hopper or Blackwell card"
            raise UserError(f"--frozen_matmul: {flags.card} has no FP8; {cure}")
    if flags.max_steps < 1:
        raise UserError(f"--max_steps: {flags.max_steps}; use 1 or more")
    budget = USABLE * flags.memory_budget_gib
    work = fitting(flags, read_workload(flags), budget)
    rows = []
    for name, label, limit in (("fastest", "fastest plan", budget), ("leanest", "minimum-memory plan", 0.0)):
        plan, found = choose_plan(work, limit, flags.host_gib)
        fit = "fits" if found.peak_gib <= budget else f"does NOT fit; to save memory: {next_memory_option(work, plan)}"
        print(f"{label}: peak {found.peak_gib:.1f} of {flags.memory_budget_gib:g} GiB, at {found.moment}: {fit}")
        print(f"  {plan.describe(work.layers)}")
        if found.host_gib:
            print(f"  {found.host_gib:.1f} GiB of pinned CPU memory")
        rows.append({"name": name, "plan": asdict(plan), **asdict(found), **estimated_time(flags, work, plan)})
    outside = LIBRARIES_GIB + CONTEXT_GIB + paged_bytes(work) / GIB
    print(f"outside PyTorch's allocator: about {outside:.1f} GiB of CUDA context, libraries, paged optimizer states")
    print(f"disk: {checkpoint_bytes(work) / GIB:.2g} GiB per checkpoint, of all GPUs")
    exact = replace(work, in_float8=work.in_float8 and flags.frozen_matmul != "auto")
    tokens = longest(exact, budget, flags.host_gib) // work.rows * work.sequence_processes
    each = " on each GPU" if work.processes > 1 else ""
    limits = f"{flags.memory_budget_gib:g} GiB of GPU and {flags.host_gib:g} GiB of pinned CPU memory{each}"
    print(f"longest sample in {limits}: about {tokens} tokens")
    if flags.output_json:
        result = {"workload": asdict(work), "plans": rows, "longest_tokens": tokens}
        write_json(flags.output_json, result)


if __name__ == "__main__":
    main()
