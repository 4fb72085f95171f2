"""How is training distributed: one process, DDP, or ZeRO-1/2/3, and over how many processes is a row split?"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Strategy:
    """Model replicas (DDP), or DeepSpeed ZeRO: stage 1 shards optimizer states, 2 also gradients, 3 also weights."""

    processes: int = 1
    zero_stage: int | None = None  # None without DeepSpeed
    offloads_optimizer: bool = False  # optimizer states in CPU memory, updated by DeepSpeed's CPU Adam
    sequence_processes: int = 1  # of `processes`, how many share a row

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only a shard of each weight, and gathers it when the module runs."""
        return self.zero_stage == 3

    @property
    def shards(self) -> int:
        """Over how many processes the weights are partitioned."""
        return self.processes if self.shards_weights else 1

    @property
    def data_processes(self) -> int:
        """How many processes, or groups of them that share rows, read different rows."""
        return self.processes // self.sequence_processes

    def __str__(self) -> str:
        if self.zero_stage is not None:
            return f"ZeRO-{self.zero_stage}"
        return "DDP" if self.processes > 1 else "one process"

    def describe(self, longest: int) -> str:
        """One line for the summary; `longest`: tokens of a row."""
        if self.processes == 1:
            return str(self)
        rows = f"{self.data_processes} data parallel"
        if self.sequence_processes > 1:
            part = -(-longest // self.sequence_processes)
            rows = f"each row split over {self.sequence_processes}, at most {part} tokens on each, {rows}"
        return f"{self}, {self.processes} processes: {rows}"


def training_strategy(deepspeed: str | dict | None, processes: int = 1, sequence_processes: int = 1) -> Strategy:
    """The strategy of a run.

    Args:
        deepspeed: DeepSpeed's configuration, or the path of its JSON file; None without DeepSpeed.
        processes: of the run, on all machines.
        sequence_processes: that share a row.
    """
    if not deepspeed:
        return Strategy(processes, sequence_processes=sequence_processes)
    zero = read_deepspeed(deepspeed).get("zero_optimization", {})
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return Strategy(processes, zero.get("stage", 0), is_offloaded, sequence_processes)


def read_deepspeed(deepspeed: str | dict) -> dict:
    return deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
