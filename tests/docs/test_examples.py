"""The examples, on a small part of the sample."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from cache_schemas import Status
from dimefm import CacheConfig, Store, cache
from dimefm.export.export_student import export
from dimefm.prediction.config import PredictConfig
from dimefm.prediction.predict import Prediction, open_predictor
from dimefm.sources.account import Account
from dimefm.sources.base import SourceFile, TextSample
from tests.contracts.source_contract import ImageSourceContract
from tests.docs.pages import ROOT
from tests.making import encoded, make_jpeg, picture
from tests.test_rooms import names
from tests.tiny_onnx import write_onnx

EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_examples_are_short_and_say_how_they_are_run() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 5
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60
        assert f"python examples/{script.name}" in (ast.get_docstring(ast.parse(text)) or "")


def test_cache_and_train_then_zero_shot_in_plain_open_clip(
    place: Path, teacher_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student of the first example is exported, and read by the third, which does not import dimefm."""
    main = example("cache_and_train").main
    arguments = (str(place / "images"), str(place / "sentences"), str(place / "labelled_set"), teacher_name)
    main(*arguments, str(tmp_path), steps=2)
    assert "2 steps done\nlabelled_set: top1 0." in capsys.readouterr().out
    export(str(tmp_path / "RUN"), out=str(tmp_path / "STUDENT"))

    last = "zero_shot_with_open_clip"
    assert not {name for name in names(EXAMPLES / f"{last}.py") if name.startswith("dimefm")}
    chances = example(last).probabilities(str(tmp_path / "STUDENT"), str(place / "cat.jpg"), ["a cat", "a dog"])
    assert len(chances) == 2
    assert sum(chances) == pytest.approx(1)


_WITHOUT = """
import sys
for name in ("torch", "open_clip", "transformers", "dimefm", "cache_schemas"):
    sys.modules[name] = None  # so that importing it raises
import runpy
sys.argv = sys.argv[1:]
print(runpy.run_path(sys.argv[0])["probabilities"](sys.argv[1], sys.argv[2], sys.argv[3:]))
"""


@pytest.mark.parametrize("size", [(90, 61), (33, 48)])
def test_zero_shot_in_plain_onnxruntime_is_what_predict_says(tmp_path: Path, size: tuple[int, int]) -> None:
    """The example reads the folder alone, in a process without torch and dimefm."""
    student, labels = write_onnx(tmp_path / "student"), ["cat", "an old ship", "airplane"]
    (tmp_path / "a.png").write_bytes(encoded(picture(size), "PNG"))
    words = [sys.executable, "-c", _WITHOUT, str(EXAMPLES / "zero_shot_with_onnx.py"), student, str(tmp_path / "a.png")]
    done = subprocess.run([*words, *labels], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = PredictConfig(model=student, images=(str(tmp_path / "a.png"),), classes=tuple(labels))
    with open_predictor(config) as predictor:
        (found,) = predictor.run()
    assert isinstance(found, Prediction)
    chances = {guess.name: guess.probability for guess in found.guesses}
    assert json.loads(done.stdout) == pytest.approx([chances[label] for label in labels], abs=1e-6)


@pytest.mark.slow
def test_zero_shot_in_plain_transformers(place: Path, teacher_name: str, tmp_path: Path) -> None:
    """With the teacher's folder in place of a student: the sample's students are no CLIPModels."""
    teacher, name = teacher_name.removeprefix("local-dir:"), "zero_shot_with_transformers"
    export(teacher, out=str(tmp_path / "STUDENT"), format="transformers")
    assert not {one for one in names(EXAMPLES / f"{name}.py") if one.startswith(("dimefm", "open_clip"))}
    chances = example(name).probabilities(str(tmp_path / "STUDENT"), str(place / "cat.jpg"), ["a cat", "a dog"])
    assert sum(chances) == pytest.approx(1)


class TestZippedImages(ImageSourceContract):
    def make(self, folder: Path) -> object:
        members = {f"{key}.jpg": data for key, data in self.images().items()}
        return example("custom_image_source").ZippedImages(str(write_zip(folder / "photos.zip", members)))


def test_a_source_of_ones_own_is_cached_resumed_and_refused_when_it_has_changed(
    tmp_path: Path, teacher_name: str
) -> None:
    source = example("custom_image_source").ZippedImages
    members = {f"{number}.jpg": make_jpeg(seed=number) for number in range(5)} | {"notes.txt": b"a", "5.png": b"no"}
    archive, out = write_zip(tmp_path / "photos.zip", members), str(tmp_path / "IMAGES.zarr")

    def run() -> Store:
        config = CacheConfig(kind="image", sources=(source(str(archive)),), out=out, teacher=teacher_name, pixels=32)
        return cache(config)

    store = run()
    assert store.status().tolist() == [Status.OK] * 5 + [Status.UNDECODABLE]
    assert store.plan(0)["key"].to_pylist() == ["0", "1", "2", "3", "4", "5"]
    summary = store.schema.source
    assert summary.arguments == ("ZippedImages (a Source)",)
    assert [(one.count, one.example) for one in summary.skipped] == [(1, "notes.txt")]
    assert run().contents == store.contents

    write_zip(archive, {"0.jpg": members["0.jpg"]})
    with pytest.raises(Exception, match="has changed since it was planned"):
        run()


class Haiku:
    """Sentences from no file at all."""

    def files(self) -> list[SourceFile]:
        return []

    def samples(self, account: Account) -> list[TextSample]:
        return [TextSample("1", "an old silent pond"), TextSample("2", "a frog jumps into the pond")]


def test_a_source_of_sentences_may_stand_beside_paths(tmp_path: Path, place: Path, teacher_name: str) -> None:
    captions = str(place / "sentences" / "captions.txt")
    out = str(tmp_path / "TEXTS.zarr")
    store = cache(CacheConfig(kind="text", sources=(Haiku(), captions), out=out, teacher=teacher_name))
    assert store.plan(0)["text"].to_pylist()[:2] == ["an old silent pond", "a frog jumps into the pond"]
    assert store.schema.rows == 202
