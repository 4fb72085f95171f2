"""CPU memory left on the machine and in its container: made-up cgroup files."""

from types import SimpleNamespace

import pytest

from component.memory import host

MIB = 2**20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(lines of /proc/self/cgroup, {file: content}): 100 MiB free, with these cgroup files."""

    def make(lines: list[str], files: dict[str, object]) -> None:
        (tmp_path / "process").write_text("".join(f"{line}\n" for line in lines))
        for name, content in files.items():
            file = tmp_path / "mount" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")

    monkeypatch.setattr(host, "PROCESS", tmp_path / "process")
    monkeypatch.setattr(host, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * MIB))
    return make


def group(version: int, folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    """The files of one memory cgroup; `used` and `cache` in MiB."""
    names = host.VERSION_2 if version == 2 else host.VERSION_1
    values = (limit, used * MIB)
    files = {f"{folder}{name}": value for name, value in zip(names, values, strict=False)}
    return files | {f"{folder}memory.stat": f"anon 5\n{names[2]} {cache * MIB}"}


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ([], {}, 100),
        (["0::/"], {}, 100),
        (["0::/"], group(2, "", "max", 50), 100),
        (["0::/"], group(2, "", 80 * MIB, 50), 30),
        (["0::/"], group(2, "", 80 * MIB, 50, cache=20), 50),  # page cache is freed on demand
        (["0::/"], group(2, "", 500 * MIB, 50), 100),
        (["0::/"], group(2, "", 80 * MIB, 90), 0),
        (["0::/a/b"], group(2, "a/b/", 80 * MIB, 50), 30),
        (["0::/a/b"], group(2, "a/b/", "max", 5) | group(2, "a/", 60 * MIB, 50), 10),  # a parent's limit
        (["0::/host/path"], group(2, "", 80 * MIB, 50), 30),  # seen from inside a container
        (["4:memory:/"], group(1, "memory/", 80 * MIB, 50, cache=10), 40),
        (["3:cpu:/a", "4:cpuset,memory:/a/b", "0::/"], group(1, "memory/a/b/", 80 * MIB, 70), 10),
        (["4:memory:/a"], group(1, "memory/", 80 * MIB, 50), 30),
        (["4:memory:/"], group(1, "memory/", 9223372036854771712, 50), 100),  # no limit
        (["0::/"], {"memory.max": "nonsense"}, 100),
    ],
)
def test_k11_the_containers_limit(machine, lines, files, left):
    machine(lines, files)
    assert host.free_host_bytes() == left * MIB


def test_a_system_without_cgroups(machine):
    assert not host.PROCESS.exists()
    assert host.free_host_bytes() == 100 * MIB
