"""How is training distributed over processes? The one answer that loading, memory plans, summary and saving read."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Strategy:
    """Replicas of the model (DDP), or DeepSpeed's ZeRO: 1 shards optimizer states, 2 gradients, 3 weights too."""

    processes: int = 1
    zero_stage: int | None = None  # None without DeepSpeed
    offloads_optimizer: bool = False  # its states are in host memory, and DeepSpeed's CPU Adam steps

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only its part of each weight and gathers the rest when a module runs."""
        return self.zero_stage == 3

    def __str__(self) -> str:
        if self.zero_stage is not None:
            return f"ZeRO-{self.zero_stage}"
        return "DDP" if self.processes > 1 else "one process"


def training_strategy(deepspeed: str | dict | None, processes: int = 1) -> Strategy:
    """The strategy of a run.

    Args:
        deepspeed: DeepSpeed's configuration or the JSON file that holds it; None without DeepSpeed.
        processes: data-parallel processes.
    """
    if not deepspeed:
        return Strategy(processes)
    zero = read_deepspeed(deepspeed).get("zero_optimization", {})
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return Strategy(processes, zero.get("stage", 0), is_offloaded)


def read_deepspeed(deepspeed: str | dict) -> dict:
    return deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
