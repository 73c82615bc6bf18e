"""What the machine is asked: precision by capability, cores and memory by nested control groups, open files."""

import resource
from pathlib import Path

import pytest
import torch

from dimefm import machine
from tests.processes import result_of


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


def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    """A tree of control groups with these files, in which this process is in `own`."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")


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
        "cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n",
    }  # fmt: skip
    control_groups(tmp_path, monkeypatch, "4:memory:/a/b\n2:cpu,cpuacct:/a\n1:name=systemd:/\n", files)
    assert machine.available_memory() == 4_000_000
    assert machine.cpus() == 1


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
