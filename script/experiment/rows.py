"""Which runs do the experiments compare? Each is a set of changes to one shared YAML.

    python script/experiment/rows.py

Prints one line per run: name, label, extended lengths and number of seeds.
"""

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

BASE_CONTEXT = 1024  # tokens, of the model of script/experiment/pretrain.py, which the experiments extend
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
# LongQLoRA as in the paper, with a learning rate for a model this small
RECIPE: dict[str, Any] = {
    "sft": False,
    "max_steps": 400,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-4,  # with S2, better than 1e-3 and 3e-3 after 200 steps
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
class Config:
    name: str
    label: str  # in tables
    changes: dict[str, Any] = field(default_factory=dict)  # to RECIPE
    program: str | None = "train.py"  # None: untrained
    rope_type: str | None = "linear"  # of untrained runs; None: positions not scaled
    seeds: int = 1  # at the first length; one at the others
    lengths: tuple[int, ...] = (4096,)  # tokens to extend the context to
    windows: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)  # tokens per evaluation window
    also: tuple[str, ...] = ()  # further evaluations at the first length: see `run.further_tasks`


def main_runs() -> list[Config]:
    both, close = (4096, 8192), 3
    modest = {"target_modules": ATTENTION}
    return [
        Config("base", "base, positions as they are", program=None, rope_type=None),
        *(
            Config(f"untrained-{rope}", f"{rope}, untrained", program=None, rope_type=rope, lengths=both)
            for rope in ("linear", "dynamic", "yarn")
        ),
        Config(
            "longqlora",
            "**LongQLoRA**: NF4, all linears, S2",
            seeds=close,
            lengths=both,
            also=("shift_short", "nf4", "merged-fp16", "merged-nf4"),
        ),
        Config("full-last", "the same, full attention in the last 10 % of the steps", LAST, seeds=close, lengths=both),
        Config("yarn-last", "**our YAMLs**: the same with yarn", YARN | LAST, seeds=close, lengths=both),
        Config("full-attention", "LongQLoRA, full attention", NO_S2, seeds=close, lengths=both),
        Config("rolled", "LongQLoRA, the original's rolled S2", program=ROLLED, seeds=close, also=("rolled",)),
        Config(
            "longlora",
            "LongLoRA: 16 bits, rank 8 on q,k,v,o, embeddings, norms",
            {**modest, "load_in_4bit": False, "lora_rank": 8, "lora_alpha": 16, "train_embedding": True}
            | {"train_norm": True},
            seeds=close,
        ),
        Config("attention-only", "LoRA on q,k,v,o", modest, seeds=close),
        Config("attention-norms", "LoRA on q,k,v,o, + norms", {**modest, "train_norm": True}, seeds=close),
        Config("attention-embeddings", "LoRA on q,k,v,o, + embeddings", {**modest, "train_embedding": True}),
        Config("all", "all linears + norms + embeddings", {"train_norm": True, "train_embedding": True}, seeds=close),
        Config("16-bit", "LongQLoRA on a 16-bit base", {"load_in_4bit": False}, seeds=close),
        Config("full", "full fine-tuning, full attention", full(1e-4), program=FULL, seeds=close, lengths=both),
        Config("full-yarn", "the same, yarn", full(1e-4) | YARN, program=FULL, seeds=close, lengths=both),
    ]


def ablation_runs() -> list[Config]:
    cosine, rank_8 = {"lr_scheduler_type": "cosine"}, rank(8)
    slow_end = {"full_attention_ratio": 0.25} | cosine
    configs = [
        *(Config(f"rank-{r}", f"rank {r}", rank(r)) for r in (8, 16, 32, 128, 256)),
        Config("rank-8-attention", "rank 8 on q,k,v,o", {**rank_8, "target_modules": ATTENTION}),
        Config("rank-8-norms", "rank 8 + norms", {**rank_8, "train_norm": True}),
        Config("rank-8-embeddings", "rank 8 + embeddings", {**rank_8, "train_embedding": True}),
        *(Config(f"steps-{n}", f"{n} steps", {"max_steps": n}) for n in (100, 200, 1000)),
        *(Config(f"groups-{r:g}", f"group size {r:g} x length", {"group_size_ratio": r}) for r in (0.125, 0.5, 1.0)),
        Config("rate-0.001", "learning rate 0.001", {"learning_rate": 1e-3}),
        *(
            Config(f"last-{x:g}", f"full attention in the last {100 * x:g} %", {"full_attention_ratio": x})
            for x in (0.05, 0.25)
        ),
        Config("last-0.25-cosine", "full attention in the last 25 %, cosine", slow_end),
        Config("last-rate-0.001", "full attention in the last 10 %, rate 0.001", LAST | {"learning_rate": 1e-3}),
        Config("last-steps-1000", "full attention in the last 10 %, 1000 steps", LAST | {"max_steps": 1000}),
        Config("yarn", "yarn", YARN),
        Config("yarn-full-attention", "yarn, full attention", YARN | NO_S2, lengths=(4096, 8192)),
        *(
            Config(f"yarn-last-{name}", f"our YAMLs, {text} in FP8", YARN | LAST | {"frozen_matmul": matmul}, seeds=3)
            for name, text, matmul in (
                ("fp8", "products with frozen weights", "fp8"),
                ("fp8-backward", "gradients of activations", "fp8_backward"),
            )
        ),
        Config("dynamic-last", "dynamic, full attention in the last 10 %", {"rope_type": "dynamic"} | LAST),
        Config("yarn-last-0.25-cosine", "yarn, full attention in the last 25 %, cosine", YARN | slow_end),
        *(Config(f"yarn-last-rank-{r}", f"our YAMLs, rank {r}", YARN | LAST | rank(r)) for r in (8, 32, 256)),
        *(
            Config(f"yarn-last-steps-{n}", f"our YAMLs, {n} steps", YARN | LAST | {"max_steps": n})
            for n in (100, 1000)
        ),
        Config("full-cosine", "full fine-tuning, cosine", full(1e-4) | cosine, program=FULL),
        Config("full-steps-1000", "full fine-tuning, 1000 steps", full(1e-4) | {"max_steps": 1000}, program=FULL),
        *(Config(f"full-rate-{x:g}", f"full fine-tuning at {x:g}", full(x), program=FULL) for x in (3e-5, 3e-4)),
    ]
    # the effect of more training alone: at the base's own length, positions are not scaled
    same_length = Config("not-stretched", "more training at 1024 tokens", NO_S2, lengths=(1024,), windows=(512, 1024))
    return [*(replace(config, windows=(1024, *config.lengths)) for config in configs), same_length]


def rank(number: int) -> dict[str, Any]:
    """With alpha / rank = 1."""
    return {"lora_rank": number, "lora_alpha": number}


def full(learning_rate: float) -> dict[str, Any]:
    """Full fine-tuning needs a lower learning rate than adapters."""
    return NO_S2 | {"learning_rate": learning_rate}


def all_runs() -> dict[str, Config]:
    return {config.name: config for config in (*main_runs(), *ablation_runs())}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for config in all_runs().values():
        print(f"{config.name:<24}{config.label:<60}{config.lengths} x {config.seeds}")
