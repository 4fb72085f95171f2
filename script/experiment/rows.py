"""What is compared in the experiments: one entry per row, each a change of the YAML that all share.

python script/experiment/rows.py     # prints the rows
"""

from dataclasses import dataclass, field, replace
from typing import Any

ATTENTION = "q_proj,k_proj,v_proj,o_proj"
# LongQLoRA as the paper has it, at a rate that fits so small a model; what a row changes is named in the row
RECIPE: dict[str, Any] = {
    "sft": False,
    "max_steps": 400,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-4,  # with S2 better than 1e-3 and 3e-3 after 200 steps
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "lora_rank": 64,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "optim": "adamw_torch",
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "resume_from_checkpoint": None,
    "overwrite_output_dir": True,
}
TOKENS_PER_STEP = 16384
NO_S2: dict[str, Any] = {"use_shift_short_attention": False}
LAST: dict[str, Any] = {"full_attention_ratio": 0.1}
YARN: dict[str, Any] = {"rope_type": "yarn"}
ROLLED, FULL = "script/experiment/train_rolled.py", "script/experiment/train_full.py"


@dataclass(frozen=True)
class Row:
    name: str
    says: str  # what people read in the table
    changes: dict[str, Any] = field(default_factory=dict)  # of RECIPE
    program: str | None = "train.py"  # None: nothing is trained
    rope_type: str | None = "linear"  # None: positions as they are
    seeds: int = 1  # at the first of the lengths; at others one
    lengths: tuple[int, ...] = (4096,)  # tokens that the context is extended to
    windows: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)  # tokens, that are evaluated
    also: tuple[str, ...] = ()  # further evaluations, at the first of the lengths: see `run.further_tasks`


def main_rows() -> list[Row]:
    both, close = (4096, 8192), 3
    modest = {"target_modules": ATTENTION}
    return [
        Row("base", "base, positions as they are", program=None, rope_type=None),
        *(
            Row(f"untrained-{rope}", f"{rope}, untrained", program=None, rope_type=rope, lengths=both)
            for rope in ("linear", "dynamic", "yarn")
        ),
        Row(
            "longqlora",
            "**LongQLoRA**: NF4, all linears, S2",
            seeds=close,
            lengths=both,
            also=("shift_short", "nf4", "merged-fp16", "merged-nf4"),
        ),
        Row("full-last", "the same, full attention in the last 10 % of the steps", LAST, seeds=close, lengths=both),
        Row("yarn-last", "**our YAMLs**: that, with yarn in place of linear", YARN | LAST, seeds=close, lengths=both),
        Row("full-attention", "LongQLoRA, full attention", NO_S2, seeds=close, lengths=both),
        Row("rolled", "LongQLoRA, the original's rolled S2", program=ROLLED, seeds=close, also=("rolled",)),
        Row(
            "longlora",
            "LongLoRA: 16 bits, rank 8 on q,k,v,o, embeddings, norms",
            {**modest, "load_in_4bit": False, "lora_rank": 8, "lora_alpha": 16, "train_embedding": True}
            | {"train_norm": True},
            seeds=close,
        ),
        Row("attention-only", "LoRA on q,k,v,o", modest, seeds=close),
        Row("attention-norms", "LoRA on q,k,v,o, + norms", {**modest, "train_norm": True}, seeds=close),
        Row("attention-embeddings", "LoRA on q,k,v,o, + embeddings", {**modest, "train_embedding": True}),
        Row("all", "all linears + norms + embeddings", {"train_norm": True, "train_embedding": True}, seeds=close),
        Row("16-bit", "LongQLoRA on a 16-bit base", {"load_in_4bit": False}, seeds=close),
        Row("full", "full fine-tuning, full attention", full(1e-4), program=FULL, seeds=close, lengths=both),
        Row("full-yarn", "the same, yarn", full(1e-4) | YARN, program=FULL, seeds=close, lengths=both),
    ]


def ablation_rows() -> list[Row]:
    cosine, rank_8 = {"lr_scheduler_type": "cosine"}, rank(8)
    slow_end = {"full_attention_ratio": 0.25} | cosine
    rows = [
        *(Row(f"rank-{r}", f"rank {r}", rank(r)) for r in (8, 16, 32, 128, 256)),
        Row("rank-8-attention", "rank 8 on q,k,v,o", {**rank_8, "target_modules": ATTENTION}),
        Row("rank-8-norms", "rank 8 + norms", {**rank_8, "train_norm": True}),
        Row("rank-8-embeddings", "rank 8 + embeddings", {**rank_8, "train_embedding": True}),
        *(Row(f"steps-{n}", f"{n} steps", {"max_steps": n}) for n in (100, 200, 1000)),
        *(Row(f"groups-{r:g}", f"groups of {r:g} of the row", {"group_size_ratio": r}) for r in (0.125, 0.5, 1.0)),
        Row("rate-0.001", "learning rate 0.001", {"learning_rate": 1e-3}),
        *(
            Row(f"last-{x:g}", f"full attention in the last {100 * x:g} %", {"full_attention_ratio": x})
            for x in (0.05, 0.25)
        ),
        Row("last-0.25-cosine", "full attention in the last 25 %, cosine", slow_end),
        Row("last-rate-0.001", "full attention in the last 10 %, learning rate 0.001", LAST | {"learning_rate": 1e-3}),
        Row("last-steps-1000", "full attention in the last 10 %, 1000 steps", LAST | {"max_steps": 1000}),
        Row("yarn", "yarn", YARN),
        Row("yarn-full-attention", "yarn, full attention", YARN | NO_S2, lengths=(4096, 8192)),
        Row("dynamic-last", "dynamic, full attention in the last 10 %", {"rope_type": "dynamic"} | LAST),
        Row("yarn-last-0.25-cosine", "yarn, full attention in the last 25 %, cosine", YARN | slow_end),
        *(Row(f"yarn-last-rank-{r}", f"our YAMLs, rank {r}", YARN | LAST | rank(r)) for r in (8, 32, 256)),
        *(Row(f"yarn-last-steps-{n}", f"our YAMLs, {n} steps", YARN | LAST | {"max_steps": n}) for n in (100, 1000)),
        Row("full-cosine", "full fine-tuning, cosine", full(1e-4) | cosine, program=FULL),
        Row("full-steps-1000", "full fine-tuning, 1000 steps", full(1e-4) | {"max_steps": 1000}, program=FULL),
        *(Row(f"full-rate-{x:g}", f"full fine-tuning at {x:g}", full(x), program=FULL) for x in (3e-5, 3e-4)),
    ]
    # what more training alone does at the base's own length: its positions are not stretched
    same_length = Row("not-stretched", "more training at 1024 tokens", NO_S2, lengths=(1024,), windows=(512, 1024))
    return [*(replace(row, windows=(1024, *row.lengths)) for row in rows), same_length]


def rank(number: int) -> dict[str, Any]:
    """alpha / rank stays 1."""
    return {"lora_rank": number, "lora_alpha": number}


def full(learning_rate: float) -> dict[str, Any]:
    """Every weight trains: at a lower rate than adapters."""
    return NO_S2 | {"learning_rate": learning_rate}


def all_rows() -> dict[str, Row]:
    return {row.name: row for row in (*main_rows(), *ablation_rows())}


if __name__ == "__main__":
    for row in all_rows().values():
        print(f"{row.name:<22}{row.says:<60}{row.lengths} x {row.seeds}")
