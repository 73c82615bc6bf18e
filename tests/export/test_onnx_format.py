"""A model as an ONNX folder: what is in it, and that it is the model.

Shapes: B images or sentences.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas.export import Export
from dimefm.errors import OutputExistsError, StoreError
from dimefm.export.describe_export import describe_export
from dimefm.export.export_student import export
from dimefm.models.clip import load_clip
from dimefm.models.exported import read_export
from tests.tiny_clip import SIDE, WIDTH, write_clip

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("models") / "tiny", scale=3)


@pytest.fixture(scope="module")
def folder(source: str, cifar10: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, whose graph takes pixels as they are, in half weights."""
    out = tmp_path_factory.mktemp("exports") / "onnx"
    export(source, str(out), format="onnx", precision="fp16", image_input="uint8", check_on=(cifar10,))
    return out


def session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_folder_has_graphs_a_tokenizer_and_what_was_checked(folder: Path, source: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "dimefm_export.json", "text_model.onnx", "tokenizer.json", "vision_model.onnx",
    ]  # fmt: skip
    document: Export = read_export(str(folder))
    assert document.onnx is not None
    assert (document.onnx.opset, document.onnx.image_input, document.model.precision) == (18, "uint8", "fp16")
    assert document.checks is not None
    assert document.checks["images/cifar10"] == 200
    assert min(document.checks["image_cosine"], document.checks["text_cosine"]) > 0.99999
    weights = Path(source, "open_clip_model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < 0.6 * weights
    lines = describe_export(str(folder), "OUT")
    assert "dimefm evaluate OUT SET" in lines[0]
    assert "on 64 images, smallest cosine 1 - " in lines[2]
    assert "of 200 images of cifar10" in lines[3].replace("on 200", "of 200")


def test_every_batch_size_gives_the_models_embeddings(folder: Path, source: str) -> None:
    clip, draw = load_clip(f"local-dir:{source}", device="cpu"), torch.Generator().manual_seed(0)
    image, text = (session(folder / name) for name in ("vision_model.onnx", "text_model.onnx"))
    for count in (1, 2, 7, 64):
        pixels_B3HW = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
        tokens = clip.tokenize([f"a photo of {number} cats" for number in range(count)])
        (image_BD,) = image.run(["image_embeds"], {"pixel_values": pixels_B3HW.numpy()})
        (text_BD,) = text.run(["text_embeds"], {"input_ids": tokens.numpy()})
        for found_BD, expected_BD in (
            (image_BD, clip.encode_images(pixels_B3HW)),
            (text_BD, clip.encode_tokens(tokens)),
        ):
            assert found_BD.shape == (count, WIDTH)
            np.testing.assert_allclose(np.linalg.norm(found_BD, axis=1), 1, atol=1e-6)
            np.testing.assert_allclose(found_BD, expected_BD.numpy(), atol=5e-3)  # weights are rounded to float16


def test_a_graph_says_how_it_is_used(folder: Path, source: str) -> None:
    facts = load_clip(f"local-dir:{source}", device="cpu").identity
    image, text = (
        session(folder / name).get_modelmeta().custom_metadata_map for name in ("vision_model.onnx", "text_model.onnx")
    )
    preprocessing = json.loads(image["preprocessing"])
    assert (preprocessing["size"], preprocessing["mean"], preprocessing["resize_mode"]) == (
        [SIDE, SIDE], [0.5, 0.5, 0.5], "shortest",
    )  # fmt: skip
    assert image["pixel_values"].startswith("uint8 RGB (batch, 3, height, width), 0 to 255")
    assert (text["context_length"], text["input_ids"]) == ("32", "int64 (batch, 32), by tokenizer.json")
    for one in (image, text):
        assert float(one["logit_scale"]) == facts.logit_scale
        assert int(one["embed_dim"]) == WIDTH


def test_a_folder_of_another_format_is_neither_overwritten_nor_exported(folder: Path, source: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputExistsError, match="holds a model in the format onnx"):
        export(source, str(folder))
    with pytest.raises(StoreError, match="is a model in the format onnx already"):
        export(str(folder), str(folder.parent / "other"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
