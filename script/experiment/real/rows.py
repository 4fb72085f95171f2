"""Which runs compare recipes on a real pretrained model? Each is a set of changes to one shared YAML.

    python script/experiment/real/rows.py

Prints one line per run: name, label, extended length, seeds, and whether it is measured by RULER.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from script.experiment.rows import ATTENTION, FULL, LAST, NO_S2, YARN
from script.experiment.rows import RECIPE as SMALL_RECIPE

LENGTH = 32768  # tokens: extended context, and of a training sample
BASE_CONTEXT = 8192  # of SmolLM2; with another base, PoSE trains at rows of its own context
RECIPE: dict[str, Any] = SMALL_RECIPE | {  # what differs from the experiments on a small model
    "max_steps": 120,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    "logging_steps": 5,
    "frozen_matmul": "unquantized",  # but in the rows about FP8, on any GPU
}
RAISED: dict[str, Any] = {
    "rope_type": "theta",
    "rope_theta": 1e6,
}  # SmolLM2's is 1e5; NTK-aware for 4 x would be 4.2e5
FULL_TUNING = YARN | NO_S2 | {"learning_rate": 1e-4, "gradient_checkpointing": True}
CLOSE = 3  # seeds of the rows that are compared closely


@dataclass(frozen=True)
class Row:
    name: str
    label: str  # in tables
    changes: dict[str, Any] = field(default_factory=dict)  # to RECIPE
    program: str | None = "train.py"  # None: untrained
    rope_type: str | None = None  # of untrained rows; None: positions not scaled
    seeds: int = 1
    length: int = LENGTH
    has_ruler: bool = False  # at the first seed
    texts: str = "train"  # data/TEXTS.jsonl


def all_rows() -> dict[str, Row]:
    ours, long = YARN | LAST, 131072
    rows = [
        Row("base", "base, positions as they are", program=None, has_ruler=True),
        *(
            Row(f"untrained-{kind}", f"{kind}, untrained", program=None, rope_type=kind)
            for kind in ("linear", "dynamic")
        ),
        Row("untrained-yarn", "yarn, untrained", program=None, rope_type="yarn", has_ruler=True),
        Row("untrained-theta", "theta raised, untrained", RAISED, program=None, rope_type="theta"),
        Row("paper", "LongQLoRA as in the paper: linear, S2", seeds=CLOSE, has_ruler=True),
        Row("paper-last", "the same, full attention in the last 10 % of the steps", LAST),
        Row("ours", "**ours**: yarn, S2, full attention in the last 10 %", ours, seeds=CLOSE, has_ruler=True),
        Row("yarn-s2", "yarn, S2 throughout", YARN),
        Row(
            "last-0.25",
            "yarn, S2, full attention in the last 25 %",
            YARN | {"full_attention_ratio": 0.25},
            has_ruler=True,
        ),
        Row("full-attention", "yarn, full attention throughout", YARN | NO_S2, seeds=CLOSE, has_ruler=True),
        Row("ours-300", "ours, 300 steps", ours | {"max_steps": 300}, has_ruler=True),
        Row("ours-fp8", "ours, frozen weights multiplied in FP8", ours | {"frozen_matmul": "fp8"}, seeds=CLOSE),
        Row(
            "ours-fp8-backward",
            "ours, gradients of activations in FP8",
            ours | {"frozen_matmul": "fp8_backward"},
            seeds=CLOSE,
        ),
        Row("rate-2.5e-4", "ours, half the learning rate", ours | {"learning_rate": 2.5e-4}),
        Row("rate-1e-3", "ours, twice the learning rate", ours | {"learning_rate": 1e-3}, has_ruler=True),
        Row("groups-0.5", "ours, groups of half the sequence", ours | {"group_size_ratio": 0.5}),
        Row("theta", "theta raised, S2, full attention in the last 10 %", RAISED | LAST),
        Row("pose", "yarn, PoSE: full attention in rows of 8192 tokens", YARN | NO_S2 | {"position_skipping": True}),
        Row("full", "full fine-tuning, yarn, full attention", FULL_TUNING, program=FULL),
        Row("rank-8", "ours, rank 8", ours | {"lora_rank": 8, "lora_alpha": 8}),
        Row("mixture", "ours, a third of the tokens in short texts", ours | {"packing": True}, texts="mixture"),
        Row(
            "longlora",
            "LongLoRA's setting: 16 bits, linear, S2, rank 8 on q,k,v,o, embeddings, norms",
            {"target_modules": ATTENTION, "load_in_4bit": False, "lora_rank": 8, "lora_alpha": 16}
            | {"train_embedding": True, "train_norm": True},
        ),
        Row(  # as many steps and tokens as the others, in rows four times as long
            "ours-131072",
            "ours, 131072 tokens",
            ours | {"gradient_accumulation_steps": 1},
            length=long,
            texts="train-131072",
        ),
    ]
    return {row.name: row for row in rows}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for row in all_rows().values():
        print(f"{row.name:<20}{row.label:<82}{row.length:>7} x {row.seeds}{'  RULER' if row.has_ruler else ''}")
