"""What the machine is asked: precision by capability, cores and memory by nested control groups, open files."""

import resource
from pathlib import Path

import pytest
import torch

from dimefm.retrieval.build_index import IndexConfig, preview_build
from dimefm.system import machine
from dimefm.training import text_bank
from pipeline.workers import choose_workers
from tests.processes import result_of
from tests.stores import random_store


@pytest.mark.parametrize(
    ("kind", "amx", "chosen"),
    [("AVX512", True, "bf16"), ("AVX512", False, "fp32"), ("AVX2", True, "fp32"), ("AVX2", False, "fp32")],
)
def test_a_cpu_computes_in_bf16_only_with_amx(
    kind: str, amx: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)  # which is no guide
    assert machine.choose_precision("cpu") == chosen
    assert machine.describe("cpu").endswith(" AMX") == (chosen == "bf16")


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_would_emulate_bf16_computes_in_fp16(
    native: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert machine.choose_precision("cuda") == chosen
    assert machine.emulates("bf16", "cuda") == (not native)


SECOND = ["/ {}/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"]
FIRST = [
    "/ {}/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755",
    "/ {}/cgroup/memory rw - cgroup cgroup rw,memory",
    "/ {}/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
]


def control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], mounts: list[str] = SECOND
) -> None:
    """A tree of control groups with these files, mounted so, in which this process is in `own`."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(own)
    lines = [f"{20 + number} 19 0:{number} {mount.format(tmp_path)}\n" for number, mount in enumerate(mounts)]
    (tmp_path / "self" / "mountinfo").write_text("19 1 254:0 / / rw - ext4 /dev/vda rw\n" + "".join(lines))
    monkeypatch.setattr(machine, "_PROCESS", tmp_path / "self")


def test_the_least_limit_of_nested_control_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory.max": "max\n", "slice/memory.max": "3000000\n", "slice/job/memory.max": "5000000\n",
        "slice/cpu.max": "100000 100000\n", "slice/job/cpu.max": "max 100000\n", "other/memory.max": "1\n",
    }  # fmt: skip
    control_groups(tmp_path, monkeypatch, "0::/slice/job\n", files)
    assert machine.available_memory() == 3_000_000
    assert machine.cpus() == 1


def test_the_first_version_of_control_groups_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/a/memory.limit_in_bytes": "4000000\n",
        "cpu,cpuacct/a/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }  # fmt: skip
    control_groups(tmp_path, monkeypatch, "4:memory:/a/b\n2:cpu,cpuacct:/a\n1:name=systemd:/\n", files, FIRST)
    assert machine.available_memory() == 4_000_000
    assert machine.cpus() == 1


@pytest.mark.parametrize(
    ("own", "mounts", "files"),
    [
        # Version 2 beside version 1, with memory in the second: as systemd's hybrid set-up has it.
        ("4:cpu:/\n0::/a\n", [*FIRST, "/ {}/cgroup/unified rw - cgroup2 cgroup2 rw"],
         {"unified/a/memory.max": "5000000"}),
        # A container of its own namespace: its group is the root.
        ("0::/\n", SECOND, {"memory.max": "5000000", "memory.high": "max"}),
        # One that sees its name outside, and its own group mounted as the root.
        ("4:memory:/docker/x\n", ["/docker/x {}/cgroup/memory rw - cgroup cgroup rw,memory"],
         {"memory/memory.limit_in_bytes": "5000000"}),
        ("4:memory:/docker/x/y\n", ["/docker/x {}/cgroup/memory rw - cgroup cgroup rw,memory"],
         {"memory/memory.limit_in_bytes": "9000000", "memory/y/memory.limit_in_bytes": "5000000"}),
        # One that was entered from outside of its namespace.
        ("0::/../../job\n", SECOND, {"memory.max": "5000000"}),
        # A limit of a group that is not to be seen.
        ("4:memory:/x\n", FIRST, {"memory/x/memory.limit_in_bytes": "9223372036854771712",
                                  "memory/x/memory.stat": "cache 1\nhierarchical_memory_limit 5000000\nrss 7"}),
        # Groups that are slowed down before they are full.
        ("0::/a/b\n", SECOND, {"a/memory.high": "5000000", "a/b/memory.max": "7000000", "a/b/memory.high": "max"}),
        # A mount with a space in its name.
        ("0::/\n", ["/ {}/cgroup/a\\040b rw - cgroup2 cgroup2 rw"], {"a b/memory.max": "5000000"}),
    ],
    ids=["hybrid", "namespace", "container", "nested in one", "entered", "not seen", "high", "space"],
)  # fmt: skip
def test_limits_count_however_the_groups_are_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, mounts: list[str], files: dict[str, str]
) -> None:
    control_groups(tmp_path, monkeypatch, own, files, mounts)
    assert machine.available_memory() == 5_000_000


@pytest.mark.parametrize("limit", ["8000000000", "max"])
def test_defaults_follow_the_memory_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Of an index and of the sentences in memory; the workers of a cache."""
    whole = machine.available_memory()
    control_groups(tmp_path, monkeypatch, "0::/a/b\n", {"a/memory.max": limit, "a/b/memory.max": "max"})
    memory = min(whole, int(limit)) if limit.isdigit() else machine.available_memory()
    store, _ = random_store(tmp_path / "t.zarr", rows=32, shard_rows=16, kind="text")
    assert preview_build(IndexConfig(store=store.path, out=str(tmp_path / "t.index"))).memory == memory // 2
    assert text_bank._room_in_memory() == memory // text_bank._SHARE
    monkeypatch.setattr("pipeline.workers.cpus", lambda: 1000)
    weights = 1_000_000_000
    found = choose_workers("cpu", shards=10**6, weight_bytes=weights, seconds=lambda: 1e9)
    assert found == int(0.9 * memory) // (2 * weights)


def limited() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (20_000_000_000, resource.RLIM_INFINITY))
    return machine.available_memory()


def test_a_limit_of_the_address_space_counts() -> None:
    assert result_of(limited) <= 20_000_000_000


def test_without_limits_the_machine_is_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups(tmp_path, monkeypatch, "0::/\n", {"memory.max": "max\n", "cpu.max": "max 100000\n"})
    assert machine.available_memory() > 10**8
    assert machine.cpus() >= 1


def raised() -> tuple[int, int]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    return machine.open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    found, soft = result_of(raised)
    assert found == soft > 128
