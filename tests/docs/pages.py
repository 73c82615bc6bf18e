"""The fenced blocks of a Markdown page, and what can be done with one: run it, or parse every line of it.

The first word after the fence is the language; a second word says what a test does with the block:

    ```sh runs        every line is a `dimefm` command, and all are run, in the folder that the pages share
    ```sh parsed      every `dimefm` command line is parsed by the real command; other programs must be known.
                      A block that says nothing is parsed, too
    ```python runs    is executed; the blocks of a page share their names
    ```python parsed  is compiled, and what it imports must be there

So that a page can show the real thing, what would cost hours or a download has a stand-in when it is run: STAND_INS.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.__main__ import COMMANDS
from dimefm.cli import cli

ROOT = Path(__file__).parents[2]
MODES = ("runs", "parsed")
PLAIN = ("text", "json", "bibtex", "mermaid")
"""Languages of blocks that are shown only: output, documents, pictures."""

TEACHER = ["--teacher", "ViT-L-14-quickgelu", "--pretrained", "openai"]
STAND_INS = {
    "train-student": "--student test_resnet --image-size 32 --batch-size 64 --texts-per-step 64 --max-steps 4 "
    "--workers 0 --precision fp32 --checkpoint-every 2"
}
"""What is added to a command when it is run. The teacher of the pages, TEACHER, becomes a tiny one."""

# Programs of which a line may consist in a block that is parsed. Of these only their form is looked at.
_OTHERS = (
    "source", "pip", "python3", "git", "cd", "export", "ray", "nvidia-smi", "unset", "sbatch", "docker", "kubectl",
    "img2dataset",
)  # fmt: skip
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, what is done with it, and its text."""

    page: Path
    line: int
    language: str
    mode: str
    body: str

    @property
    def where(self) -> str:
        """For messages: `docs/stage1.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page. Of another language than those that are known here there must be none."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, mode = match["info"].strip().partition(" ")
        commands = language in ("sh", "python")
        mode = mode or "parsed" * commands
        block = Block(page, text.count("\n", 0, match.start()) + 1, language, mode, match["body"])
        known = mode in MODES if commands else language in PLAIN and not mode
        assert known, f"{block.where}: write ```sh runs, ```sh parsed, or python so, or one of {', '.join(PLAIN)}"
        found.append(block)
    return found


def command_lines(block: Block) -> list[list[str]]:
    """The lines of a shell block as words, without comments; a line that ends in a backslash goes on."""
    lines = re.sub(r"\\\n", " ", block.body).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def to_run(block: Block, teacher: str) -> Iterator[list[str]]:
    """The words of each `dimefm` command of a block that is run, with stand-ins."""
    for words in command_lines(block):
        assert words[0] == "dimefm", f"{block.where}: {words[0]} is not run; put the line into a block that is parsed"
        text = shlex.join(words[1:]).replace(shlex.join(TEACHER), shlex.join(["--teacher", teacher]))
        yield [*shlex.split(text), *STAND_INS.get(words[1], "").split()]


def check_commands(block: Block) -> int:
    """Parse each line of a shell block; how many `dimefm` commands were among them."""
    count = 0
    for words in command_lines(block):
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable of the environment for this line
            words = words[1:]
        if "dimefm" in words and words[0] != "pip":
            _parse(words[words.index("dimefm") + 1 :], block)
            count += 1
        elif words:
            _check_other(words, block)
    return count


def _parse(words: list[str], block: Block) -> None:
    """Parse the words of a command as click does. `...` stands for what a line leaves out, required options too."""
    if words in ([], ["--help"], ["--version"]):
        return
    context = click.Context(cli, info_name="dimefm")
    try:
        name, command, rest = cli.resolve_command(context, list(words))
        assert command is not None
        if "--help" not in rest:
            command.make_context(name, rest, parent=context)
        of_texts = set() if {"--loss", "best", "best-vit"} & set(words) else {"--texts"}  # some losses need none
        needed = {"--images", "--out"} | of_texts if name == "train-student" else set()  # or a file has them
        if not needed <= set(words) and not {"--config", "--fields"} & set(words):
            raise click.MissingParameter(ctx=context)
    except click.MissingParameter:
        assert "..." in words, f"{block.where}: dimefm {shlex.join(words)} lacks a required option"
    except click.UsageError as error:
        raise AssertionError(f"{block.where}: dimefm {shlex.join(words)}: {error.format_message()}") from None


def _check_other(words: list[str], block: Block) -> None:
    """A line of another program: what it names of this project must exist."""
    program = words[0]
    if program == "make":
        found = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        targets = found[1].split() if found else []
        for word in words[1:]:
            assert "=" in word or word in targets, f"{block.where}: make has no target {word}"
    elif program == "python" and words[1:2] == ["-m"]:
        assert importlib.util.find_spec(words[2]), f"{block.where}: there is no module {words[2]}"
        if words[2] == "benchmarks":
            assert words[3] in COMMANDS, f"{block.where}: benchmarks has no command {words[3]}"
    elif program == "python" and len(words) > 1:
        assert (ROOT / words[1]).is_file(), f"{block.where}: there is no script {words[1]}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"(?:dimefm|\.)\[([\w,]+)\]", shlex.join(words)):
            assert set(name.split(",")) <= set(extras), f"{block.where}: there is no extra {name}"
    else:
        assert program in _OTHERS, f"{block.where}: {program} is no program that this test knows"


def run_python(block: Block, names: dict[str, Any], teacher: str) -> None:
    """Execute a block, with a tiny teacher in place of the pages' one."""
    text = block.body.replace(f'teacher="{TEACHER[1]}", pretrained="{TEACHER[3]}"', f'teacher="{teacher}"')
    exec(compile(text, block.where, "exec"), names)


def check_python(block: Block) -> int:
    """Compile a block and import what it imports; how many names that were."""
    count = 0
    for node in ast.walk(ast.parse(block.body, block.where)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
                count += 1
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.where}: {node.module} has no {alias.name}"
                count += 1
    return count


# -- links ------------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)(?:\s+\"[^\"]*\")?\)")


def links(page: Path) -> list[str]:
    """The targets of all links and images of a page, outside of code."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)
    return [match["target"] for match in _LINK.finditer(re.sub(r"(`+)(?!`)(?:(?!\1).)*\1(?!`)", _keep_brackets, text))]


def _keep_brackets(code: re.Match[str]) -> str:
    """Code may stand within the text of a link; its brackets would end it."""
    return re.sub(r"[\[\]()`]", "", code[0])


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives to the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def broken(page: Path) -> list[str]:
    """What is wrong with the links of a page, a line each. Nothing is fetched."""
    wrong = []
    for target in links(page):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            if not re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(:\d+)?(/[^\s]*)?|mailto:\S+@\S+", target):
                wrong.append(f"{target}: not a https:// address")
            continue
        path = (page.parent / place).resolve() if place else page
        if place and not (path.exists() and path.is_relative_to(ROOT)):
            wrong.append(f"{target}: no such file")
        elif anchor and (path.suffix != ".md" or anchor not in anchors(path)):
            wrong.append(f"{target}: no such heading")
    return wrong
