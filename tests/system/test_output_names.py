"""The name of an output that says another kind is refused before any work, by every command that writes one."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.errors import DimefmError, OutputExistsError
from dimefm.store.embedding_store import Store
from dimefm.system.output_names import require_name, require_place


@pytest.mark.parametrize(
    ("out", "usual", "what"),
    [
        ("a/texts.idx", ".index", "a/texts.idx would be W, but .idx is the suffix of a file"),
        ("texts.zarr/", ".index", "but .zarr is the suffix of a store or pairs"),
        ("memory://bucket/pairs.index", ".zarr", "but .index is the suffix of an index"),
        ("run.JSON", "", "but .json is the suffix of a file"),
    ],
)
def test_a_suffix_of_another_kind_is_refused(out: str, usual: str, what: str) -> None:
    with pytest.raises(DimefmError) as caught:
        require_name(out, "W", usual)
    assert what in str(caught.value)
    assert caught.value.remedy == (f"give a name that ends with {usual}, or without a suffix" if usual
                                   else "leave the suffix out")  # fmt: skip


def test_every_other_name_is_taken(tmp_path: Path) -> None:
    for out, usual in (("t.index", ".index"), ("t", ".index"), ("run-0.5", ""), ("v1.2", ".zarr"), (".zarr", "")):
        require_name(out, "W", usual)
    (tmp_path / "old.idx").mkdir()
    require_name(str(tmp_path / "old.idx"), "W", ".index")  # an older release may have made it


def test_every_command_that_writes_looks_at_the_name_first(
    image_store: Store, text_store: Store, teacher_name: str, tiny_run: list[str], tmp_path: Path
) -> None:
    """Before anything is read that takes time: the other arguments need not even exist."""
    teacher = ["--teacher", teacher_name]
    for words, name in (
        (["cache-images", "no.tar", *teacher], "run.json"),
        (["cache-images", "no.tar", *teacher, "--dry-run"], "s.index"),
        (["cache-texts", "no.txt", *teacher], "t.selection"),
        (["import-embeddings", "no", "--kind", "text", *teacher], "t.npy"),
        (["build-index", text_store.path], "t.zarr"),
        (["build-index", text_store.path, "--dry-run"], "t.idx"),
        (["retrieve", "no.zarr", "--texts", "no.zarr"], "p.index"),
        (["select-texts", "no.zarr"], "s.parquet"),
        (tiny_run, "run.zarr"),
        (["export", "no"], "student.safetensors"),
        (["convert-checkpoint", __file__, *teacher], "clip.pt"),
        (["export-embeddings", image_store.path], "e.npy"),
    ):
        result = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / name)])
        assert result.exit_code == 1, f"{words}: {result.output}"
        assert f"Error: {tmp_path / name} would be " in result.output, words
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_the_place_already(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="exists and is a file"):
        require_name(str(tmp_path / "file"), "W")
    with pytest.raises(OutputExistsError, match="exists and holds something else, 'file'"):
        require_place(str(tmp_path), "mark.json")
    require_place(str(tmp_path), "file")
    require_place(str(tmp_path / "new"), "mark.json")
