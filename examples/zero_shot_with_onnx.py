"""Classify an image with an exported student in plain onnxruntime. Neither dimefm nor torch is needed for this.

    dimefm export RUN --format onnx --out STUDENT
    pip install numpy onnxruntime tokenizers pillow
    python examples/zero_shot_with_onnx.py STUDENT cat.jpg "cat" "dog" "airplane"

The folder holds two graphs, tokenizer.json, and in dimefm_export.json how images are prepared.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def run(graph: Path, values: np.ndarray) -> np.ndarray:
    """The unit-norm embeddings that a graph gives, float32 (batch, width)."""
    session = onnxruntime.InferenceSession(graph)
    return session.run(None, {session.get_inputs()[0].name: values})[0]


def pixels(image: str, facts: dict, dtype: str) -> np.ndarray:
    """The image with its shorter side resized, then cropped in the middle: (1, 3, height, width)."""
    (height, width), picture = facts["size"], Image.open(image)
    assert facts["resize_mode"] == "shortest", "squash resizes to (width, height); longest pads with fill_color"
    assert height == width, "a student's input is square"
    how = Image.Resampling.BILINEAR if facts["interpolation"] == "bilinear" else Image.Resampling.BICUBIC
    picture = picture.resize([int(height * side / min(picture.size)) for side in picture.size], how)
    left, top = (round((side - height) / 2) for side in picture.size)
    rgb = np.asarray(picture.crop((left, top, left + width, top + height)).convert("RGB"))
    if dtype == "float32":  # else the graph does this
        rgb = ((rgb / 255 - facts["mean"]) / facts["std"]).astype(np.float32)
    return rgb.transpose(2, 0, 1)[None]


def probabilities(folder: str, image: str, labels: list[str]) -> list[float]:
    """How likely each label is for the image, by the student. They add up to 1."""
    export = json.loads(Path(folder, "dimefm_export.json").read_text())
    tokenize, model = Tokenizer.from_file(f"{folder}/tokenizer.json"), export["model"]
    assert model.get("logit_bias") is None, "with a bias: 1 / (1 + exp(-(logits + logit_bias))), each by itself"
    tokens = np.array([one.ids for one in tokenize.encode_batch([f"a photo of a {label}." for label in labels])])
    of_image = run(
        Path(folder, "vision_model.onnx"), pixels(image, model["preprocessing"], export["onnx"]["image_input"])
    )
    of_labels = run(Path(folder, "text_model.onnx"), tokens)
    logits = model["logit_scale"] * (of_image @ of_labels.T)[0].astype(float)
    chances = np.exp(logits - logits.max())
    return (chances / chances.sum()).tolist()


if __name__ == "__main__":
    folder, image, *labels = sys.argv[1:]
    for probability, label in sorted(zip(probabilities(folder, image, labels), labels, strict=True), reverse=True):
        print(f"{probability:6.1%}  {label}")
