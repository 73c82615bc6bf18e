"""Every command, every piece of Python and every link of the pages: run, or parsed (see tests/docs/pages.py)."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, get_args, get_type_hints

import pytest
from click.testing import CliRunner

import cache_schemas
import dimefm
from cache_schemas import Document
from dimefm import TrainConfig
from dimefm.cli import cli
from dimefm.reproduce.stages import main as reproduce
from tests.docs.pages import MODES, ROOT, Block, blocks, broken, check_commands, check_python, links, run_python, to_run

QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
OURS = ("benchmarks", "cache_schemas", "dimefm", "docs", "examples", "pipeline", "tests")
MARKDOWN = [*sorted(ROOT.glob("*.md")), *(path for folder in OURS for path in sorted((ROOT / folder).rglob("*.md")))]

OTHERS = {"--address", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--head", "--generate",
          "--constraint", "--editable", "--nodes", "--gpus-per-node", "--time", "--no-kill", "--file", "--tag",
          "--force", "--max-restarts", "--node-rank", "--rdzv-conf"}  # fmt: skip
"""Options of ray, torchrun, pip, Slurm, docker and kubectl."""


@pytest.fixture(scope="module")
def after_quickstart(place: Path, teacher_name: str) -> Path:
    """The same folder with all that the commands of the quickstart have made: the other pages go on from there."""
    with _inside(place):
        _follow(blocks(QUICKSTART), teacher_name)
    return place


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, where `from dimefm import train` trains a tiny student, whatever it is given."""
    train = dimefm.train
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(dimefm, "train", lambda config: train(_tiny(config)))
        yield


def _tiny(config: TrainConfig) -> TrainConfig:
    sizes = {"image_size": 32, "batch_size": 64, "texts_per_step": 64, "max_steps": 4, "workers": 0}
    return replace(config, student="test_resnet", precision="fp32", **sizes)


def _follow(page: list[Block], teacher: str) -> None:
    """Do what a page says, block by block."""
    names: dict[str, Any] = {"__name__": "a page"}
    for block in page:
        if (block.language, block.mode) == ("sh", "runs"):
            for words in to_run(block, teacher):
                done = CliRunner().invoke(cli, words)
                assert done.exit_code == 0, f"{block.where}: dimefm {' '.join(words)}\n{done.output}{done.exception!r}"
        elif (block.language, block.mode) == ("python", "runs"):
            run_python(block, names, teacher)
        elif block.language == "sh":
            check_commands(block)
        elif block.language == "python":
            check_python(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs_or_parses(page: Path, after_quickstart: Path, teacher_name: str) -> None:
    with _inside(after_quickstart):
        _follow(blocks(page) if page != QUICKSTART else [], teacher_name)


def test_no_block_of_commands_is_passed_over() -> None:
    """Each is run or parsed. The least number of each, so that a page cannot stop to run its commands unseen."""
    found = [block for page in PAGES for block in blocks(page) if block.language in ("sh", "python")]
    runs, parsed = ([block for block in found if block.mode == mode] for mode in MODES)
    assert len(runs) + len(parsed) == len(found)
    assert len(runs) >= 35
    assert sum(len(list(to_run(block, ""))) for block in runs if block.language == "sh") >= 55
    assert sum(check_commands(block) for block in parsed if block.language == "sh") >= 20


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_every_page_is_in_the_index() -> None:
    listed = set(links(ROOT / "docs" / "README.md"))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def test_the_page_of_formats_names_every_field_and_version() -> None:
    """So that a field that is added to a document is described, too."""
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for kind in _documents():
        assert f"| `{kind.SCHEMA}` | {kind.VERSION} |" in page, kind
        for name in _fields(kind):
            assert f"`{name}`" in page, f"{kind.SCHEMA}: {name}"


def _documents() -> list[type[Document]]:
    """Every document of cache_schemas."""
    modules = [
        importlib.import_module(f"cache_schemas.{module.name}") for module in iter_modules(cache_schemas.__path__)
    ]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [kind for kind in found if issubclass(kind, Document) and kind is not Document]


def _fields(kind: Any) -> set[str]:
    """The names of its fields, and of those of the dataclasses in it."""
    found = set()
    for name, hint in get_type_hints(kind).items():
        if name not in ("SCHEMA", "VERSION"):
            found.add(name)
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= _fields(part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    """In its sentences and tables too, not in its commands alone."""
    commands = [*cli.commands.values(), reproduce]
    known = {name for command in commands for option in command.params for name in option.opts}
    names = re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text(encoding="utf-8"))
    found = {name for name in names if "_" not in name}  # img2dataset's have underscores
    assert found <= known | OTHERS | {"--help", "--version"}


WRONG = {
    "sh parsed\ndimefm cache-images a --out b --teacher c --no-such-option": "no such option",
    "sh parsed\ndimefm no-such-command": "No such command",
    "sh parsed\ndimefm cache-images a --teacher c": "lacks a required option",
    "sh parsed\ntorchrun --nproc-per-node 8 -m dimefm train-student --images a": "lacks a required option",
    "sh parsed\nmake no-such-target": "no target",
    "sh parsed\npython examples/no_such_script.py": "no script",
    'sh parsed\npip install "dimefm[nothing]"': "no extra",
    "sh parsed\nno-such-program": "no program",
    "sh runs\nmake test": "is not run",
    "sh skipped\ndimefm doctor": "write ```sh runs",
    "bash\ndimefm doctor": "write ```sh runs",
    "sh\ndimefm doctor --no-such-option": "no such option",
    "python parsed\nfrom dimefm import nothing": "has no nothing",
}


@pytest.mark.parametrize("block", WRONG)
def test_what_is_wrong_in_a_block_is_found(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```{block}\n```\n")
    monkeypatch.setattr(Block, "where", "page.md:1")
    with pytest.raises(AssertionError, match=f"(?i){WRONG[block]}"):
        _follow(blocks(page), "a teacher")


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `word`\n[a](nothing.md) [b](#a-word) [c](#other) [d](http://x) [`x[1]`](none.md) `[no](link)`\n"
    )
    assert [text.partition(":")[0] for text in broken(page)] == ["nothing.md", "#other", "http", "none.md"]
