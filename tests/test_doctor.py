"""`dimefm doctor`: a screen about this machine, with a remedy for each thing that wants one."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dimefm import doctor, machine
from dimefm.cli import cli


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
    monkeypatch.setitem(sys.modules, "dimefm.index", None)  # as where faiss is not installed
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
