"""`info` on exported models: what they are, where they come from, and whether they are whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cache_schemas.export import EXPORT_FILE, IMAGE_ONNX, OnnxFacts
from dimefm.cli import cli
from dimefm.errors import StoreError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.export.export_student import export
from dimefm.inspection.info import describe, examine
from dimefm.models.exported import read_export
from dimefm.models.onnx_clip import OnnxClip
from dimefm.system.progress import amount
from tests.tiny_onnx import write_onnx


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return Path(write_onnx(tmp_path / "student", teacher="w" * 64))


def test_an_onnx_student_is_described(student: Path) -> None:
    shown = " ".join(describe(str(student)).split())
    size = amount((student / IMAGE_ONNX).stat().st_size)
    for words in (
        f"{student}: onnx model",
        "student tiny after step 2 of 2",
        f"teacher a teacher, sha256 {'w' * 16}",
        "images from images.zarr: 0.tar, 32 rows",
        "images 32 x 32 px, shortest, bicubic",
        "embeddings 16 wide, logit scale 20 (softmax)",
        "graphs opset 17, float32 pixels",
        f"{IMAGE_ONNX} {size}",
        f"use with dimefm predict {student} IMAGE --classes A,B,...",
        f"measure with dimefm evaluate {student} SET",
    ):
        assert words in shown
    at_url = describe(f"local://{student}")  # by fsspec, as at any URL
    assert "graphs        opset 17" in at_url
    result = CliRunner().invoke(cli, ["info", str(student), "--json"])
    facts = json.loads(result.stdout)
    assert (facts["artefact"], facts["format"], facts["finished"]) == ("model", "onnx", True)
    assert facts["origin"]["teacher_weights"] == "w" * 64
    assert facts["files"][IMAGE_ONNX] == (student / IMAGE_ONNX).stat().st_size


def test_quantized_graphs_are_named_as_such(student: Path) -> None:
    document = read_export(str(student))
    graphs = OnnxFacts(opset=17, image_input="uint8", quantized={IMAGE_ONNX: "static int8"})
    (student / EXPORT_FILE).write_text(json.dumps(replace(document, onnx=graphs).to_json()))
    shown = " ".join(describe(str(student)).split())
    assert f"precision int8 graphs opset 17, uint8 pixels, {IMAGE_ONNX} in static int8" in shown


def test_an_open_clip_student_is_described_by_its_document(teacher_name: str, tmp_path: Path) -> None:
    export(teacher_name.removeprefix("local-dir:"), str(tmp_path / "copy"))
    facts = examine(str(tmp_path / "copy")).facts
    assert (facts["artefact"], facts["format"], facts["origin"]) == ("model", "open_clip", None)
    assert facts["load"] == f"local-dir:{tmp_path / 'copy'}"
    assert "student not known: no run is named" in " ".join(describe(str(tmp_path / "copy")).split())


@pytest.mark.parametrize("damage", ["gone", "cut", "document"])
def test_a_folder_that_is_not_whole_is_an_error(student: Path, damage: str, cifar10: str) -> None:
    """Of what reads all of it, too: results would be kept under the name of other weights."""
    file = student / IMAGE_ONNX
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        document = (student / EXPORT_FILE).read_text()
        (student / EXPORT_FILE).write_text(document.replace('"step": 2', '"step": 3'))
    what = {"gone": f"{IMAGE_ONNX} is missing", "cut": "it was changed or damaged", "document": "checksum"}[damage]
    result = CliRunner().invoke(cli, ["info", str(student)])
    assert result.exit_code == 1
    assert what in result.output
    if damage == "cut":
        with pytest.raises(StoreError, match="is not what export wrote"):
            evaluate(EvaluationConfig(model=str(student), folders=(cifar10,), out=str(student.parent / "out")))


def test_an_onnx_student_is_on_the_cpu_unless_asked(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, too."""
    from dimefm.models.clip import load_clip

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    clip = load_clip(f"local-dir:{student}")
    assert isinstance(clip, OnnxClip)
    assert clip.device.type == "cpu"
