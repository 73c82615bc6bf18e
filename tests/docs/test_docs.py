"""Every command, every piece of Python and every link of the pages: run, or parsed (see tests/docs/pages.py)."""

from __future__ import annotations

import dataclasses
import importlib
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
from tests.docs.pages import ROOT, Block, blocks, broken, check_commands, check_python, links, run_python, to_run

QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
_NOT_OURS = {".venv", "runs", ".git", ".pytest_cache", ".hypothesis", "node_modules"}
MARKDOWN = [path for path in sorted(ROOT.rglob("*.md")) if not _NOT_OURS & {*path.relative_to(ROOT).parts}]


@pytest.fixture(scope="module")
def after_quickstart(place: Path, teacher_name: str) -> Path:
    """The same folder with all that the commands of the quickstart have made: the other pages go on from there."""
    with _inside(place):
        _follow(blocks(QUICKSTART), teacher_name)
    return place


class _inside:
    """Work in a folder, with a recipe whose students are tiny."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._patch = folder, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        self._patch.chdir(self._folder)
        recipe = dimefm.paper
        self._patch.setattr(dimefm, "paper", lambda *stores: _tiny(recipe(*stores)))

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


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


def test_every_block_of_commands_is_run_or_parsed() -> None:
    """And how many of each: a page that stopped to run its commands would show here."""
    found = [block for page in PAGES for block in blocks(page) if block.language in ("sh", "python")]
    runs = [block for block in found if block.mode == "runs"]
    commands = sum(len(list(to_run(block, ""))) for block in runs if block.language == "sh")
    parsed = sum(check_commands(block) for block in found if block.language == "sh" and block.mode == "parsed")
    assert len(runs) + sum(block.mode == "parsed" for block in found) == len(found)
    assert (len(runs) >= 15, commands >= 25, parsed >= 25) == (True, True, True), (len(runs), commands, parsed)


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
