"""How much CPU memory is left? What the machine has free, within the limits of our container (cgroup)."""

import math
from collections.abc import Iterator
from pathlib import Path

import psutil

PROCESS = Path("/proc/self/cgroup")  # lines id:controllers:path; version 2 has no controllers
MOUNT = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # version 1 writes a huge number for no limit
# limit, usage, and in memory.stat the page cache that the kernel frees on demand
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def free_host_bytes() -> float:
    """CPU memory that may still be used on this machine, by all processes together."""
    return min([float(psutil.virtual_memory().available), *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[float]:
    """Bytes left under the limit of each cgroup that this process is in; a parent's limit holds as well."""
    for folder, files in _own_cgroups():
        # inside a container the path may be the host's, and the container's own cgroup the root of the mount
        while True:
            yield _left(folder, *files)
            if folder in (MOUNT, MOUNT / "memory", folder.parent):
                break
            folder = folder.parent


def _own_cgroups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    try:
        lines = PROCESS.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield MOUNT / path.strip("/"), VERSION_2
        elif "memory" in controllers.split(","):
            yield MOUNT / "memory" / path.strip("/"), VERSION_1


def _left(folder: Path, limit_file: str, usage_file: str, cache: str) -> float:
    try:
        limit = (folder / limit_file).read_text().strip()
        if limit == "max" or int(limit) >= UNLIMITED:
            return math.inf
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage_file).read_text()) - int(statistics.get(cache, 0))
    except (OSError, ValueError):  # not a memory cgroup
        return math.inf
    return float(max(0, int(limit) - used))
