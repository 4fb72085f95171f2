"""Which rows may a benchmark have, and with which settings does each kind train?"""

import re
from dataclasses import dataclass, field

from component.error import UserError, nearest
from script.performance.peers import PEERS
from script.shared.shape import SHAPES

RECIPE = {
    "sft": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "optim": "paged_adamw_32bit",
    "weight_decay": 0.0,
    "max_grad_norm": 0.3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "overwrite_output_dir": True,
}
ON_CARD = "./train_args/deepspeed/deepspeed_config_s2_no_offload.json"
ON_HOST = "./train_args/deepspeed/deepspeed_config_s2.json"
MINIMUM_MEMORY = {
    "keep_layers": 0,
    "keep_attention_layers": 0,
    "keep_attention_output": False,
    "offload_activations": True,
    "mlp_tile_tokens": 2048,
    "loss_chunk_tokens": 1024,
}
UNQUANTIZED = {"frozen_matmul": "unquantized"}
OURS = {
    "fastest": {"bf16": True, **UNQUANTIZED, "memory_budget_gib": 32, "deepspeed": ON_CARD},
    "fp8": {"bf16": True, "frozen_matmul": "fp8", "memory_budget_gib": 32, "deepspeed": ON_CARD},
    "fp8_backward": {"bf16": True, "frozen_matmul": "fp8_backward", "memory_budget_gib": 32, "deepspeed": ON_CARD},
    "leanest": {"bf16": True, **UNQUANTIZED, "memory_budget_gib": 32, "deepspeed": ON_HOST, **MINIMUM_MEMORY},
    "v100": {
        "fp16": True,
        "use_flash_attn": False,
        "use_liger_kernel": False,
        "memory_budget_gib": 10,
        "deepspeed": ON_CARD,
    },
    "by_heads": {"bf16": True, **UNQUANTIZED, "memory_budget_gib": 32, "deepspeed": ON_CARD},
    "off": {"bf16": True, "memory_plan": False, "gradient_checkpointing": True, "deepspeed": ON_CARD},
}
KINDS = [*(f"ours_{name}" for name in OURS), *(f"ours_python_{name}" for name in OURS), *PEERS]


@dataclass
class Row:
    size: str
    length: int  # tokens
    kind: str
    steps: int = 0  # the first is warm-up; 0: 3 or 4, enough for a median
    overrides: dict = field(default_factory=dict)
    cards: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("size", self.size, SHAPES), ("kind", self.kind, KINDS)):
            if value not in known:
                raise UserError(f"{name}: {value!r} is none of {', '.join(known)}{nearest(str(value), known)}")
        parts = self.overrides.get("sequence_parallel_size", 1)
        if not (isinstance(self.cards, int) and isinstance(parts, int) and self.cards >= parts >= 1):
            raise UserError(f"cards: {self.cards!r}; use a number of at least 1 and of sequence_parallel_size")
        if self.cards % parts:
            raise UserError(f"cards: {self.cards}; use a multiple of sequence_parallel_size, {parts}")
        if self.cards > 1 and self.kind in PEERS:
            raise UserError(f"cards: {self.cards}; {self.kind} runs on one")
        self.length = int(self.length)
        self.steps = int(self.steps) or (4 if self.length <= 65536 else 3)
        if self.kind in PEERS and set(self.overrides) - {"memory_budget_gib"}:
            raise UserError(f"overrides: {self.overrides}; {self.kind} takes memory_budget_gib alone")

    @property
    def group(self) -> int | None:
        """Group size of S2-Attn in tokens; None with full attention."""
        has_groups = self.kind == "original" or self.kind.startswith("ours")
        if not (has_groups and self.overrides.get("use_shift_short_attention", True)):
            return None
        return self.overrides.get("group_size") or self.length // 4

    @property
    def rows_per_step(self) -> int:
        return self.cards // self.overrides.get("sequence_parallel_size", 1)

    @property
    def name(self) -> str:
        """Identifies the measurement: rows with the same name are the same; also the name of its files."""
        words = [self.size, self.length, self.kind, *(f"{k}={v}" for k, v in sorted(self.overrides.items()))]
        words += [f"{self.cards}-cards"] if self.cards > 1 else []
        return re.sub(r"[^\w.=-]+", "_", "-".join(map(str, words)))


def key(found: dict) -> dict:
    return {name: found[name] for name in ("size", "length", "kind", "overrides", "cards") if name in found}


def is_done(row: Row, found: list[dict]) -> bool:
    """Whether `row` was measured or ran out of memory. Rows with other errors are retried."""
    return any(
        Row(**key(old)).name == row.name and ("error" not in old or "out of memory" in old["error"].lower())
        for old in found
    )
