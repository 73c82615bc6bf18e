"""`dimefm doctor`: a screen about this machine, with a remedy for each thing that wants one."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.inspection import doctor
from dimefm.system import machine


def lines() -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["doctor"])
    return result.exit_code, result.output


def test_a_machine_that_runs_these_tests_is_well() -> None:
    code, output = lines()
    assert code == 0, output
    names = "dimefm cores memory /dev/shm disk cpu torch gpu faiss ray jpeg device teacher student readers"
    assert [name for name in names.split() if f" {name} " not in output] == []
    assert "STOPS" not in output
    assert f"{machine.choose_precision('cpu')}, " in output


def test_a_library_that_cannot_be_imported_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return importlib.import_module(name)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=broken))
    code, output = lines()
    assert code == 1
    assert "STOPS  torchvision" in output
    assert "torchvision::nms does not exist" in output
    assert "-> pip install" in output


def test_what_is_tight_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "free_shared_memory", lambda: 64_000_000)
    monkeypatch.setattr(machine, "available_memory", lambda: 2_000_000_000)
    monkeypatch.setattr(machine, "open_files", lambda: 256)
    (tmp_path / "ray").write_text("no folder")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "dimefm.retrieval.faiss_index", None)  # as where faiss is not installed
    code, output = lines()
    assert code == 0, output
    for name, remedy in (
        ("/dev/shm", "--shm-size"), ("memory", "--workers 1"), ("open files", "ulimit -Hn"), ("ray", "RAY_TMPDIR"),
        ("faiss", "pip install faiss-cpu"),
    ):  # fmt: skip
        after = output.partition(f"look   {name}")[2]
        assert remedy in after.partition("->")[2].partition("\n")[0], (name, output)


def test_hardly_any_open_files_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "open_files", lambda: 40)
    code, output = lines()
    assert code == 1
    assert "STOPS  open files" in output


def test_a_gpu_that_torch_cannot_use_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is too old, or too new, for this torch: it is listed all the same."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    facts = SimpleNamespace(name="NVIDIA GeForce", total_memory=8_000_000_000)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: facts)

    def no_kernel(*size: int, device: str) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with")

    monkeypatch.setattr("torch.ones", no_kernel)
    code, output = lines()
    assert code == 1
    assert "STOPS  gpu 0" in output
    assert "no kernel image is available" in output
    assert "-> install the torch that fits it" in output
    assert "Compile with" not in output


@pytest.mark.parametrize(("free", "state"), [(79, "ok   "), (30, "look ")])
def test_a_gpu_that_others_use_wants_a_look(monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    import torch

    facts = SimpleNamespace(name="NVIDIA H100", total_memory=80_000_000_000)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: facts)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (free * 10**9, 80 * 10**9))
    monkeypatch.setattr("torch.ones", lambda *size, device: torch.zeros(*size))
    found = doctor._gpu(0)
    assert found.state == state.strip()
    assert found.value == f"NVIDIA H100, 80.0 GB, {free}.0 GB free"
    assert ("nvidia-smi" in found.remedy) == (free < 64)


def test_a_gpu_that_is_hidden_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hidden by CUDA_VISIBLE_DEVICES" in lines()[1]
