"""leaks of sentences: captions of test images that are trained on."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dimefm.errors import MismatchError, OutputExistsError, SourceError
from dimefm.inspection.info import describe, examine
from dimefm.leaks.find_text_leaks import same_words
from dimefm.models.clip import Clip
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.retrieve import write_pairs
from dimefm.selection.select_texts import SelectionConfig, select_texts
from dimefm.store.embedding_store import Store
from dimefm.store.selected_texts import SelectedTexts
from tests.leaks.planted import run, write_captions


@pytest.fixture(scope="module")
def captions(text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """The folder of the set, and the rows of the sentences that it has for captions."""
    folder = tmp_path_factory.mktemp("captions") / "coco"
    return folder, write_captions(folder, text_store)


def test_captions_that_are_trained_on_are_found(
    text_store: Store, captions: tuple[Path, set[int]], clip: Clip, tmp_path: Path
) -> None:
    out = tmp_path / "l.selection"
    found = run(text_store, captions[0], out, clip)
    leaks = [one for one in pq.read_table(out / "leaks.parquet").to_pylist() if one["leak"]]
    assert {one["row"] for one in leaks} == captions[1]
    assert sorted(one["test_key"] for one in leaks) == ["image0#0", "image1#1", "image2#0"]
    assert sorted(one["similarity"] == 1 for one in leaks) == [False, True, True]
    assert [(one.tested, one.leaked) for one in found.sets] == [(12, 3)]
    assert "3 of 12 captions of own-coco" in describe(str(out))
    assert examine(str(out)).facts["rows"] == 3


def test_a_selection_leaves_them_out(
    image_store: Store, text_store: Store, captions: tuple[Path, set[int]], clip: Clip, tmp_path: Path
) -> None:
    leaks, pairs = str(tmp_path / "l.selection"), str(tmp_path / "p.zarr")
    run(text_store, captions[0], Path(leaks), clip)
    search = ExactSearch(text_store)
    write_pairs(image_store, text_store, search, index="exact", index_digest="e", top_k=200, out=pairs)
    words: dict[str, Any] = {"pairs": pairs, "by": "random", "size": text_store.schema.rows}
    select_texts(SelectionConfig(out=str(tmp_path / "all.selection"), **words))
    found = select_texts(SelectionConfig(out=str(tmp_path / "t.selection"), without=leaks, **words))
    every, kept = (set(SelectedTexts(str(tmp_path / f"{n}.selection")).rows().tolist()) for n in ("all", "t"))
    assert every - kept == captions[1]
    assert found.dropped["in a test set, by --without"] == 3
    with pytest.raises(OutputExistsError, match="without: None != "):
        select_texts(SelectionConfig(out=str(tmp_path / "all.selection"), without=leaks, **words))


def test_what_does_not_fit_is_refused(
    image_store: Store, text_store: Store, captions: tuple[Path, set[int]], cifar10: str, clip: Clip, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="has classes and no captions"):
        run(text_store, Path(cifar10), tmp_path / "a.selection", clip)
    run(text_store, captions[0], tmp_path / "l.selection", clip)
    with pytest.raises(OutputExistsError, match=r":\n  - similarity: 0\.9 != 0\.5\n"):
        run(text_store, captions[0], tmp_path / "l.selection", clip, similarity=0.5)
    run(image_store, captions[0], tmp_path / "i.selection", clip)
    search, pairs = ExactSearch(text_store), str(tmp_path / "p.zarr")
    write_pairs(image_store, text_store, search, index="exact", index_digest="e", top_k=2, out=pairs)
    with pytest.raises(MismatchError, match=r"i\.selection is about .*i.*\.zarr, not about"):
        select_texts(
            SelectionConfig(pairs=pairs, out=str(tmp_path / "t.selection"), without=str(tmp_path / "i.selection"))
        )


@pytest.mark.parametrize(
    ("one", "other", "least", "most"),
    [
        ("A dog runs.", "a DOG runs", 1, 1),
        ("a dog runs on the beach", "a dog runs on a beach", 0.8, 0.9),
        ("a dog runs", "two ships at sea", 0, 0),
        ("...", "!!", 1, 1),
        ("...", "a dog", 0, 0),
    ],
)
def test_the_same_words(one: str, other: str, least: float, most: float) -> None:
    assert least <= same_words(one, other) <= most
