"""How is training distributed: one process, DDP, or ZeRO-1/2/3?"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Strategy:
    """Model replicas (DDP), or DeepSpeed ZeRO: stage 1 shards optimizer states, 2 also gradients, 3 also weights."""

    processes: int = 1
    zero_stage: int | None = None  # None without DeepSpeed
    offloads_optimizer: bool = False  # optimizer states in CPU memory, updated by DeepSpeed's CPU Adam

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only a shard of each weight, and gathers it when the module runs."""
        return self.zero_stage == 3

    def __str__(self) -> str:
        if self.zero_stage is not None:
            return f"ZeRO-{self.zero_stage}"
        return "DDP" if self.processes > 1 else "one process"


def training_strategy(deepspeed: str | dict | None, processes: int = 1) -> Strategy:
    """The strategy of a run.

    Args:
        deepspeed: DeepSpeed's configuration, or the path of its JSON file; None without DeepSpeed.
        processes: data-parallel processes.
    """
    if not deepspeed:
        return Strategy(processes)
    zero = read_deepspeed(deepspeed).get("zero_optimization", {})
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return Strategy(processes, zero.get("stage", 0), is_offloaded)


def read_deepspeed(deepspeed: str | dict) -> dict:
    return deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
