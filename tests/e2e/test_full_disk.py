"""A disk that is full: whatever the command, one message that names the place and what to do, and nothing half written.

Those of caches, an index, pairs and a selection are in tests/test_faults.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dimefm.cli import cli
from dimefm.store.embedding_store import Store
from tests.disks import Disk

COMMANDS = ["train-student", "export", "export-embeddings", "import-embeddings", "evaluate", "compare", "submission"]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@dataclass
class Commands:
    """The words of each command, all but --out, and the bytes that it writes."""

    words: dict[str, list[str]]
    sizes: dict[str, int]


@pytest.fixture(scope="module")
def commands(
    tiny_run: list[str], image_store: Store, teacher_name: str, cifar10: str, tmp_path_factory: pytest.TempPathFactory
) -> Commands:
    out = tmp_path_factory.mktemp("undisturbed")
    place = {name: str(out / name) for name in ("run", "clip", "embeddings", "evaluations")}
    known = ["--data", str(Path(cifar10).parent), "--sets", "cifar10", "--predictions", "--device", "cpu"]
    words = {
        "train-student": tiny_run,
        "export": ["export", place["run"]],
        "export-embeddings": ["export-embeddings", image_store.path],
        "import-embeddings": [
            "import-embeddings", place["embeddings"], "--kind", "image", "--teacher", teacher_name, "--check", "0"
        ],
        "evaluate": ["evaluate", place["clip"], *known],
        "compare": ["compare", f"{place['evaluations']}/clip"],
        "submission": ["submission", f"{place['evaluations']}/clip"],
    }  # fmt: skip
    names = ["run", "clip", "embeddings", "s.zarr", "evaluations", "table.md", "s.zip"]
    sizes = {}
    for name, (command, given) in zip(names, words.items(), strict=True):
        result = run(*given, "--out", str(out / name))
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
        found = [out / name, *(out / name).rglob("*")]
        sizes[command] = sum(-(-path.stat().st_size // 4096) * 4096 for path in found if path.is_file())
    return Commands(words, sizes)


@pytest.mark.parametrize(("command", "share"), [
    pytest.param(command, share, marks=pytest.mark.slow if share == 0.9 else ())
    for command in COMMANDS for share in (0.0, 0.5, 0.9) if command != "compare" or share == 0
])  # fmt: skip
def test_a_full_disk_ends_a_command_with_what_to_do_and_leaves_nothing_half_written(
    disk: Disk, commands: Commands, command: str, share: float
) -> None:
    out = disk.path / "out"
    out = out.with_suffix({"compare": ".md", "submission": ".zip"}.get(command, ""))
    blocks = max(1, int(share * commands.sizes[command]) // 4096)
    disk.options(f"size={4 * blocks}k")
    if share == 0:
        with (disk.path / "other").open("wb", buffering=0) as file:
            file.write(bytes(4096))
    result = run(*commands.words[command], "--out", str(out))
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    message = rf"Error: {out}\S* cannot be written: No space left on device\n  remedy: make room, and run"
    assert len(re.findall(message, result.output)) == result.output.count("Error: ") == 1, result.output
    assert not [path for path in disk.path.rglob("*") if "unfinished" in path.name]
    disk.options("size=64m")
    result = run(*commands.words[command], "--out", str(out))
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
