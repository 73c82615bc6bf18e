"""`dimefm search`: a sentence or an image finds itself, in what a person can read; a mistake ends in one message."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dimefm.cli import cli
from dimefm.errors import MismatchError, SourceError, StoreError, TeacherError
from dimefm.inspection.info import describe
from dimefm.models.clip import Clip
from dimefm.models.onnx_towers import OnnxTowers
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.search import search, show
from dimefm.retrieval.searched import Hit
from dimefm.store.embedding_store import Store
from tests.making import encoded, make_jpeg, picture, read_tar
from tests.stores import random_store
from tests.tiny_onnx import write_onnx

ROWS = [0, 41, 199]


@pytest.fixture(scope="module")
def sentences(text_store: Store) -> list[str]:
    """The sentences at ROWS of the text store."""
    return [entry["text"] for entry in text_store.samples(np.array(ROWS))]


@pytest.fixture(scope="module")
def index(text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("index") / "t.index")
    build_index(IndexConfig(store=text_store.path, out=out))
    return out


@pytest.fixture
def image(image_tar: Path, tmp_path: Path) -> tuple[str, str]:
    """A file with an image of the image store, and its key."""
    name, data = list(read_tar(image_tar, 96).items())[70]
    (tmp_path / "mine.jpg").write_bytes(data)
    return str(tmp_path / "mine.jpg"), name.removesuffix(".jpg")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["search", *map(str, arguments), "--device", "cpu"])


def refused(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.output.count("Error: ")) == (code, 1), result.output
    return result.output


# -- what is found ----------------------------------------------------------------------------------------------------


def test_every_sentence_finds_itself_first(text_store: Store, sentences: list[str]) -> None:
    found = search(text_store.path, texts=sentences, top_k=5, device="cpu")
    assert [hits[0].row for hits in found] == ROWS
    assert [hits[0].entry["text"] for hits in found] == sentences
    assert [hits[0].score for hits in found] == pytest.approx([1.0] * 3, abs=1e-3)
    for hits in found:
        assert len(hits) == 5
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_an_image_finds_its_own_row_first(image_store: Store, image: tuple[str, str]) -> None:
    (hits,) = search(image_store.path, images=[image[0]], top_k=3, device="cpu")
    assert hits[0].score > 0.999 > hits[1].score
    assert (hits[0].row, hits[0].entry["key"]) == (70, image[1])


def test_a_store_of_float32_is_searched_in_float32(
    text_store: Store, sentences: list[str], clip: Clip, tmp_path: Path
) -> None:
    """As `evaluate` keeps its features: to seven digits, where float16 has three."""
    values = clip.encode_texts(sentences).numpy()
    identity = {field.name: getattr(clip.identity, field.name) for field in dataclasses.fields(clip.identity)}
    store, _ = random_store(
        tmp_path / "t.zarr", rows=3, shard_rows=16, kind="text", values=values, dtype="float32", **identity
    )
    found = search(store.path, texts=sentences, device="cpu")
    assert [hits[0].row for hits in found] == [0, 1, 2]
    true = values[0].astype(np.float64) @ values.astype(np.float64).T
    assert [hit.score for hit in found[0]] == pytest.approx(sorted(true, reverse=True), abs=1e-6)
    assert "float32 (3, " in describe(store.path)


def test_scores_are_the_cosines_of_the_rows_in_the_store(image_store: Store, sentences: list[str], clip: Clip) -> None:
    """Of a sentence to images."""
    (hits,) = search(image_store.path, texts=sentences[:1], top_k=96, device="cpu")
    query_D = clip.encode_texts(sentences[:1])[0].numpy()
    cosine_N = image_store.read(0, 96).astype(np.float32) @ query_D
    assert sorted(hit.row for hit in hits) == list(range(96))
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosine_N)[::-1], atol=1e-3)
    np.testing.assert_allclose([hit.score for hit in hits], cosine_N[[hit.row for hit in hits]], atol=1e-3)


def test_an_index_finds_what_its_store_does(text_store: Store, index: str, sentences: list[str]) -> None:
    by_index, exactly = (search(path, texts=sentences, top_k=7, device="cpu") for path in (index, text_store.path))
    for one, other in zip(by_index, exactly, strict=True):
        assert [hit.row for hit in one] == [hit.row for hit in other]
        np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in other], atol=1e-3)


@pytest.mark.parametrize("kind", ["store", "index"])
def test_asking_for_more_than_there_are_gives_all(text_store: Store, index: str, kind: str) -> None:
    (hits,) = search(text_store.path if kind == "store" else index, texts=["a dog"], top_k=10**12, device="cpu")
    assert sorted(hit.row for hit in hits) == list(range(200))


def test_no_query_finds_nothing(text_store: Store) -> None:
    assert search(text_store.path, device="cpu") == []


# -- a student in place of the teacher ---------------------------------------------------------------------------------


def test_a_student_searches_a_store_of_its_teacher(tmp_path: Path) -> None:
    store, values_ND = random_store(tmp_path / "t.zarr", rows=20, shard_rows=16, kind="text", weights="w" * 64)
    model = write_onnx(tmp_path / "student", teacher="w" * 64)
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))
    result = run(store.path, "--model", model, "--image", tmp_path / "a.png", "--text", "a dog", "--top-k", 20)
    assert result.stdout.startswith(f"by embeddings of the student {model}, not of its teacher\n\n{tmp_path}/a.png\n")
    document = json.loads(run(store.path, "--model", model, "--text", "a dog", "--top-k", 20, "--json").stdout)
    assert [one["model"] for one in document] == [model]
    (query_D,) = OnnxTowers(model).encode_texts(["a dog"])
    hits = document[0]["hits"]
    cosine_N = values_ND.astype(np.float32) @ query_D
    np.testing.assert_allclose([hit["score"] for hit in hits], cosine_N[[hit["row"] for hit in hits]], atol=2e-3)
    assert "model" not in json.loads(run(store.path, "--model", model, "--text", "x", "--json").stdout)[0]["hits"][0]


def test_a_student_of_another_teacher_or_of_none_is_refused(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "t.zarr", rows=20, shard_rows=16, kind="text", weights="w" * 64)
    other, none = write_onnx(tmp_path / "other", teacher="v" * 64), write_onnx(tmp_path / "none")
    for model, what in (
        (other, f"{other} was not distilled from local-dir:/somewhere, the teacher of {store.path}: weights: vvvv"),
        (none, f"{none} does not say which teacher it was distilled from\n  remedy: give the run itself"),
        (tmp_path / "othr", f"othr is neither a run nor an exported model\n  remedy: did you mean '{other}'?"),
    ):
        assert what in refused(store.path, "--text", "a dog", "--model", model)
    what = "--teacher has no effect with --model"
    assert what in refused(store.path, "--text", "x", "--model", other, "--teacher", "hf-hub:a/b", code=2)


# -- what is printed --------------------------------------------------------------------------------------------------


def test_images_come_before_sentences_each_with_cosine_row_and_what_it_is(
    image_store: Store, image_tar: Path, image: tuple[str, str]
) -> None:
    result = run(image_store.path, "--text", "a dog", "--image", image[0], "--text", "a cat", "--top-k", 2)
    assert result.exit_code == 0, result.output
    blocks = [block.splitlines() for block in result.stdout.rstrip("\n").split("\n\n")]
    assert [block[0] for block in blocks] == [image[0], "a dog", "a cat"]
    assert blocks[0][1:3] == [f"   1.000  row 70  {image[1]}", f"{' ' * 18}({image_tar})"]


def test_of_a_sentence_its_text_and_key_are_printed(text_store: Store, text_file: Path, sentences: list[str]) -> None:
    result = run(text_store.path, "--text", sentences[1], "--top-k", 1)
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[0] == sentences[1]
    assert " ".join(lines[1:]) == f"1.000  row 41  {sentences[1]}  ({text_file.name}:42)"
    assert max(map(len, lines)) <= 80


def test_a_sentence_of_a_hit_breaks_no_line() -> None:
    hits = [Hit(0.5, 7, {"text": "a dog\n on\ta  log", "key": "a.txt:8"}), Hit(-0.25, 12, {"text": "", "key": "k"})]
    assert show("q", hits) == "q\n   0.500  row 7   a dog on a log  (a.txt:8)\n  -0.250  row 12    (k)"
    assert show("q", []) == "q\n  nothing is found"


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_no_image_is_refused_before_the_teacher_is_loaded(
    text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("dimefm.models.clip.load_clip", load)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "half.jpg").write_bytes(make_jpeg()[:200])
    for name, reason in (
        ("notes.txt", "cannot identify image file"),
        ("half.jpg", "Truncated File Read"),
        ("empty.jpg", "no bytes"),
        ("nowhere.jpg", "No such file or directory"),
        (".", "Is a directory"),
    ):
        with pytest.raises(SourceError) as caught:
            search(text_store.path, images=[str(tmp_path / name)])
        assert str(caught.value) == f"{tmp_path / name}: {reason}\n  remedy: give an image file"
    assert f"Error: {tmp_path / 'notes.txt'}: " in refused(text_store.path, "--image", tmp_path / "notes.txt")


def test_a_path_that_is_neither_store_nor_index(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        message = refused(path, "--text", "a dog")
        assert f"Error: {path} is neither a dimefm store nor an index\n  remedy: " in message


def test_an_index_whose_store_is_gone(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "t.zarr", rows=20, shard_rows=16, kind="text")
    build_index(IndexConfig(store=store.path, out=str(tmp_path / "t.index")))
    (tmp_path / "t.zarr").rename(tmp_path / "moved.zarr")
    with pytest.raises(StoreError, match=r"t.zarr is not a dimefm store"):
        search(str(tmp_path / "t.index"), texts=["a dog"])


def test_a_teacher_that_is_gone_or_another(tmp_path: Path, teacher_name: str) -> None:
    store, _ = random_store(tmp_path / "t.zarr", rows=20, shard_rows=16, kind="text")
    with pytest.raises(TeacherError, match=r"cannot load local-dir:/somewhere(?s:.*)remedy: give --teacher"):
        search(store.path, texts=["a dog"])
    with pytest.raises(MismatchError, match=r"is not the teacher of .*t.zarr: weights: w != (?s:.*)give --teacher"):
        search(store.path, texts=["a dog"], teacher=teacher_name)
    with pytest.raises(TeacherError, match=r"no weights named for ViT-B-32(?s:.*)give --pretrained"):
        search(store.path, texts=["a dog"], teacher="ViT-B-32")


def test_the_teacher_where_it_is_now_finds_the_same(text_store: Store, teacher_name: str, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(teacher_name.removeprefix("local-dir:"))
    result = run(text_store.path, "--text", "a dog", "--top-k", 3, "--teacher", f"local-dir:{tmp_path / 'moved'}")
    assert result.output == run(text_store.path, "--text", "a dog", "--top-k", 3).output


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "give --image FILE or --text SENTENCE"),
        (["--text", "a dog", "--pretrained", "openai"], "--pretrained has no effect without --teacher"),
        (["--text", "a dog", "--top-k", "0"], "0 is not in the range x>=1"),
    ],
)
def test_usage_that_makes_no_sense_exits_with_2(text_store: Store, arguments: list[str], what: str) -> None:
    assert what in refused(text_store.path, *arguments, code=2)
