"""Text as people really have it: encodings, line ends, damage; JSON and tars of sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dimefm.sources import JsonArray, TarTexts
from dimefm.sources.files import stat_files
from tests.contracts.source_contract import BreakableContract, TextSourceContract
from tests.making import write_tar, write_text


class TestJsonArray(TextSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        rows = [{"id": i, "caption": text} for i, text in enumerate(self.sentences())]
        return JsonArray(*stat_files([str(write_text(folder.absolute() / "sätze.json", [json.dumps(rows)]))]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        path = write_text(folder / "a.json", [json.dumps(["one", "two", "three"], indent=1)])
        path.write_bytes(path.read_bytes()[:-6])
        return JsonArray(*stat_files([str(path)])), 2


class TestTarTexts(TextSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        members = {f"ä/{i}.txt": f"{text}\n".encode() for i, text in enumerate(self.sentences())}
        return TarTexts(*stat_files([str(write_tar(folder.absolute() / "sätze.tar", members))]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        path = write_tar(folder / "a.tar", {f"{i}.txt": b"one" * 200 for i in range(4)})
        path.write_bytes(path.read_bytes()[: 3 * 1536 + 700])
        return TarTexts(*stat_files([str(path)])), 3


class TestTarTextsOfAField(TestTarTexts):
    def make(self, folder: Path) -> Any:
        members = {f"ä/{i}.json": json.dumps({"c": text}).encode() for i, text in enumerate(self.sentences())}
        return TarTexts(*stat_files([str(write_tar(folder.absolute() / "sätze.tar", members))]), "c")
