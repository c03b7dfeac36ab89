"""What a container may use is known, whatever the kernel shows of its control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_native.config import available_memory_bytes, memory_limit_bytes

GIB = 1 << 30


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/meminfo").write_text(f"MemTotal: {1 << 30} kB\nMemAvailable: {1 << 29} kB\n")
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


# Limits are below any machine's memory: that of this one counts as well.
@pytest.mark.parametrize(
    ("groups", "files", "limit", "available"),
    [
        ("0::/\n", {"memory.max": "500000000", "memory.current": "400000000"}, 500000000, 100000000),  # a namespace of its own
        (
            "0::/kubepods/pod1/c1\n",  # the host's path: the tightest on the way up, and what that one leaves
            {
                "kubepods/pod1/c1/memory.max": "max",
                "kubepods/pod1/memory.max": "600000000",
                "kubepods/pod1/memory.current": "590000000",
                "kubepods/pod1/memory.stat": "anon 1\ninactive_file 90000000",
                "kubepods/memory.max": "700000000",
            },
            600000000,
            100000000,
        ),
        ("0::/../../elsewhere\n", {"memory.max": "500000000"}, 500000000, 500000000),  # outside of what is mounted
        (
            "4:memory:/docker/c1\n0::/\n",
            {"memory/docker/c1/memory.limit_in_bytes": "500000000", "memory/memory.limit_in_bytes": "9223372036854771712"},
            500000000,
            500000000,
        ),
        ("4:cpu,memory:/docker/c1\n", {"memory/memory.limit_in_bytes": "500000000"}, 500000000, 500000000),  # mounted as the root
    ],
    ids=["v2 namespace", "v2 host path", "v2 outside", "v1", "v1 bind mount"],
)
def test_the_tightest_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], limit: int, available: int) -> None:
    root = machine(tmp_path, groups, files)
    assert memory_limit_bytes(root) == limit
    assert available_memory_bytes(root) == available


def test_no_limit_is_the_machine(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", {"memory.max": "max"})
    assert memory_limit_bytes(root) >= memory_limit_bytes() > 0
