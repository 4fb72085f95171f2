"""How far are losses and LoRA's gradients in bf16 and in FP8 from those of exact products with the same NF4 weights?

    python script/performance/float8_error.py --model_name_or_path BASE --data_path texts.jsonl --output_json FILE
    python script/performance/float8_error.py --model_name_or_path BASE --data_path texts.jsonl --rows 2 --each_kind \\
        --steps 0 16 --output_json FILE --figure float8_error.png

The model is that of a training run: NF4 from bf16 weights, LoRA on all linear layers, no dropout. B is drawn at
random, as with B = 0 A has no gradient. After each number of --steps of training in bf16, with S2-Attn in groups of a
quarter of the row, it is measured with S2-Attn and with full attention: a base has never seen S2-Attn's groups. The
exact result is computed in fp32. Then, for the same frozen numbers and rows:

    bf16          bf16 under autocast, as with bf16: true
    fp8           the same, with frozen_matmul: fp8
    fp8_backward  the same, with frozen_matmul: fp8_backward
    fp8_in_fp32   only products with frozen weights in FP8, all else in fp32
    fp8_only_*    the same for one kind of product, on the first row (--each_kind)

The relative error is |found - exact| / |exact|, of the gradients of all rows as one vector: by layer, by kind of
projection, for A and B, and of everything. `summed` is that of the rows' sum, as in gradient accumulation: errors that
are independent between rows shrink there as the gradients do, others stay.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import check_at_least, exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub id of a base model")
    parser.add_argument("--data_path", required=True, help='texts as for train.py: lines of {"text"}, .txt, .bin, ...')
    parser.add_argument("--max_seq_length", type=int, default=2048, help="tokens per row (default 2048)")
    parser.add_argument("--rows", type=int, default=4, help="spread evenly over the data (default 4)")
    parser.add_argument("--steps", type=int, nargs="+", default=[0], help="optimizer steps, a row each (default 0)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of AdamW in these steps (default 1e-3)")
    parser.add_argument("--lora_rank", type=int, default=64, help="default 64")
    parser.add_argument("--lora_alpha", type=float, default=16, help="default 16")
    std = "standard deviation of B; 0.004 is about what 20 steps of AdamW at 2e-4 leave (default 0.004)"
    parser.add_argument("--lora_b_std", type=float, default=0.004, help=std)
    parser.add_argument("--each_kind", action="store_true", help="also FP8 in one kind of product alone, in fp32")
    parser.add_argument("--output_json", required=True, help="file for the results")
    parser.add_argument("--figure", help="PNG of the errors")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import bitsandbytes as bnb
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from component.adapter import add_adapter
from component.attention.interface import UNLIMITED, use_shift_short_attention
from component.data.collator import RightPadCollator
from component.data.dataset import load_samples
from component.error import UserError
from component.evaluate.table import grid
from component.loading import default_device
from component.memory.apply import use_memory_plan
from component.memory.linear import LoRALinear
from component.memory.plan import MemoryPlan
from component.model import load_base, load_config
from component.rope import extend_context
from component.storage.claim import claimed
from component.storage.result import origin, save_figure, write_json
from component.tokenizer import any_pad_id, load_tokenizer
from script.shared.gradient_error import Agreement, Gradients, agreement

ALONE = "fp8_only_"
COLORS = {"bf16": "#0072b2", "fp8": "#d55e00", "fp8_in_fp32": "#e69f00", "fp8_backward": "#009e73"}  # Okabe, Ito
Batch = dict[str, Tensor]
Products = dict[str, list[LoRALinear]]  # by kind


class Case(NamedTuple):
    """How losses and gradients are computed."""

    dtype: torch.dtype
    kinds: tuple[str, ...]  # of products in FP8
    forward: bool = True  # else only gradients of activations


def load_adapted(flags: argparse.Namespace, device: torch.device) -> tuple[PeftModel, Products]:
    """The model of a training run, and its products with frozen weights."""
    set_seed(42)
    config = load_config(flags.model_name_or_path)
    extend_context(config, flags.max_seq_length, field="max_seq_length")
    config.use_cache = False
    use_shift_short_attention(config, max(2, flags.max_seq_length // 8 * 2))
    base = load_base(flags.model_name_or_path, config, dtype=torch.bfloat16, load_in_4bit=True, device=device)
    model = add_adapter(base, rank=flags.lora_rank, alpha=flags.lora_alpha, dropout=0.0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=flags.lora_b_std)
    layers = config.num_hidden_layers
    plan = MemoryPlan(layers, 0, False, False, mlp_tile_tokens=0, loss_chunk_tokens=1024)  # nothing is recomputed
    fallback = use_memory_plan(model, plan, fused=False, in_float8=True)
    if fallback:
        raise UserError(f"model_name_or_path: {fallback}, which multiply in FP8")
    return model, products_of(model)


def products_of(model: PeftModel) -> Products:
    """What multiplies by frozen weights in FP8, by kind; shapes that do not fit are left out."""
    base, found = model.get_base_model(), Products()
    for layer in base.get_decoder().layers:
        parts = {name: getattr(layer.self_attn, name).projection for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        parts |= {f"{name}_proj": getattr(layer.fused_mlp, name) for name in ("gate", "up", "down")}
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    return {kind: parts for kind, parts in found.items() if all(part.float8_backward for part in parts)}


def read_rows(flags: argparse.Namespace, vocabulary: int) -> tuple[list[Batch], list[Batch]]:
    """Full rows to measure and to train on, both spread evenly over the data."""
    tokenizer = load_tokenizer(flags.model_name_or_path, flags.max_seq_length)
    options: dict[str, Any] = {"sft": False, "truncation_policy": "split", "vocab_size": vocabulary}
    samples, _ = load_samples(flags.data_path, tokenizer, flags.max_seq_length, field="data_path", **options)
    full = [
        place
        for place, ids in enumerate(sample["input_ids"] for sample in samples)
        if len(ids) == flags.max_seq_length
    ]
    needed = flags.rows + max(flags.steps)
    if len(full) < needed:
        raise UserError(
            f"--rows: {flags.rows}, and {max(flags.steps)} steps, but {flags.data_path} has {len(full)} rows of "
            f"{flags.max_seq_length} tokens; use more texts, fewer rows and steps, or a smaller --max_seq_length"
        )
    collate = RightPadCollator(any_pad_id(tokenizer))
    measured = _spread(full, flags.rows)
    trained = _spread([place for place in full if place not in measured], max(flags.steps))
    return [collate([samples[place]]) for place in measured], [collate([samples[place]]) for place in trained]


def _spread(items: list[int], count: int) -> list[int]:
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def use_case(model: PeftModel, products: Products, case: Case) -> None:
    """Compute in the dtype of `case` from now on, with the same frozen numbers, and in FP8 what it says."""
    for parameter in model.parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            parameter.quant_state.dtype = case.dtype  # in which weights are dequantized
        elif not parameter.requires_grad:
            parameter.data = parameter.data.to(case.dtype)
    for kind, parts in products.items():
        for part in parts:
            part.float8_backward = kind in case.kinds
            part.float8_forward = part.float8_backward and case.forward


def train_pass(model: PeftModel, batch: Batch, dtype: torch.dtype) -> tuple[float, Gradients]:
    """The loss of a row, and its gradients."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def cases_of(products: Products, each_kind: bool) -> dict[str, Case]:
    kinds, bf16, fp32 = tuple(products), torch.bfloat16, torch.float32
    cases = {"bf16": Case(bf16, ()), "fp8": Case(bf16, kinds), "fp8_in_fp32": Case(fp32, kinds)}
    cases["fp8_backward"] = Case(bf16, kinds, forward=False)
    return cases | ({f"{ALONE}{kind}": Case(fp32, (kind,)) for kind in kinds} if each_kind else {})


def measurements(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """After each number of steps, with S2-Attn and with full attention; written to the result file one by one."""
    model, products = load_adapted(flags, default_device())
    config = model.get_base_model().config
    groups = {"shift_short": config.group_size, "full": UNLIMITED}
    cases = {"exact": Case(torch.float32, ())} | cases_of(products, flags.each_kind)
    rows, trained = read_rows(flags, config.vocab_size)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=flags.learning_rate, weight_decay=0.0)
    found, step = [], 0
    for steps in sorted(set(flags.steps)):
        config.group_size = groups["shift_short"]
        use_case(model, products, cases["bf16"])
        for batch in trained[step:steps]:
            loss, _ = train_pass(model, batch, torch.bfloat16)
            torch.nn.utils.clip_grad_norm_(trainable, 0.3)
            optimizer.step()
            step += 1
            print(f"step {step}: loss {loss:.4f}", flush=True)
        for attention, config.group_size in groups.items():
            print(f"after {steps} steps, {attention} attention", flush=True)
            found.append({"steps": steps, "attention": attention, **measure(model, products, cases, rows)})
            print_table(found[-1]["cases"])
            write_json(flags.output_json, {**origin(), "measurements": found})
    return found


def measure(model: PeftModel, products: Products, cases: dict[str, Case], rows: list[Batch]) -> dict[str, Any]:
    """Losses of the exact case by row, and of each other one its errors."""
    by_row: dict[str, Agreement] = {name: Agreement() for name in cases}
    losses: dict[str, list[float]] = {name: [] for name in cases}
    sums: dict[str, Gradients] = {name: {} for name in cases}
    for number, batch in enumerate(rows):
        exact = Gradients()
        for name, case in cases.items():
            if name.startswith(ALONE) and number > 0:
                continue
            start = time.perf_counter()
            use_case(model, products, case)
            loss, found = train_pass(model, batch, case.dtype)
            exact = exact or found
            losses[name].append(loss)
            by_row[name].add(found, exact)
            if not name.startswith(ALONE):
                sums[name] = {key: sums[name].get(key, 0) + gradient for key, gradient in found.items()}
            print(f"{name}: loss {loss:.5f}, {time.perf_counter() - start:.1f} s", flush=True)
    exact_losses, exact_sums = losses.pop("exact"), sums.pop("exact")
    results = {}
    for name, own in losses.items():
        results[name] = {"losses": own, "loss_relative_error": loss_error(own, exact_losses)} | by_row[name].result()
        if sums[name]:
            results[name]["summed"] = agreement(sums[name], exact_sums).result()["total"]
    return {"losses": exact_losses, "cases": results}


def loss_error(found: list[float], exact: list[float]) -> float:
    """The mean over rows."""
    return round(sum(abs(a / b - 1) for a, b in zip(found, exact, strict=False)) / len(found), 8)


def print_table(cases: dict[str, dict]) -> None:
    rows = []
    for name, case in cases.items():
        worst = max(case["by_layer"], key=lambda layer: case["by_layer"][layer]["relative_error"])
        errors = [case["total"], case["by_layer"][worst], case.get("summed")]
        cells = ["-" if error is None else f"{100 * error['relative_error']:.2f} %" for error in errors]
        cells[1] += f" (layer {worst})"
        rows.append([name, f"{100 * case['loss_relative_error']:.3f} %", *cells, f"{case['total']['cosine']:.5f}"])
    print(grid(["case", "loss", "gradients", "worst layer", "summed rows", "cosine"], rows), flush=True)


def draw(found: list[dict[str, Any]], title: str, file: str) -> None:
    """By layer above, by projection below, a column for each measurement."""
    size = (1 + 4.2 * len(found), 7)
    figure, panels = plt.subplots(2, len(found), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for column, measured in enumerate(found):
        above, below = panels[:, column]
        for place, (name, color) in enumerate(COLORS.items()):
            layers, kinds = (
                {group: 100 * error["relative_error"] for group, error in measured["cases"][name][key].items()}
                for key in ("by_layer", "by_projection")
            )
            above.plot([int(layer) for layer in layers], layers.values(), color=color, label=name)
            below.bar([x + 0.2 * (place - 1.5) for x in range(len(kinds))], kinds.values(), width=0.19, color=color)
            below.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])
        above.set(title=f"{measured['steps']} steps, {measured['attention']} attention", xlabel="layer")
    for panel in panels.flat:
        panel.set_ylim(0, None)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    figure.supylabel("relative error of LoRA's gradients, %", fontsize=10)
    figure.suptitle(title, fontsize=11, parse_math=False)
    save_figure(figure, file)
    plt.close(figure)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_at_least(flags, 1, "rows", "lora_rank")
    check_at_least(flags, 8, "max_seq_length")
    check_at_least(flags, 0, "steps")
    if not flags.lora_b_std > 0:
        raise UserError(f"--lora_b_std: {flags.lora_b_std}; use a number above 0, or gradients of A are 0")
    written = {"--output_json": [flags.output_json], "--figure": [flags.figure]}
    read = {"--model_name_or_path": [flags.model_name_or_path], "--data_path": [flags.data_path]}
    with claimed(written, read, overwrite=flags.overwrite):
        found = measurements(flags)
        if flags.figure:
            draw(found, f"{flags.rows} rows of {flags.max_seq_length} tokens", flags.figure)


if __name__ == "__main__":
    main()
