"""The part of a model card that says how to use the model: code that runs as it stands in the folder of the model."""

from __future__ import annotations

from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX, TOKENIZER_FILE, Export
from cache_schemas.identity import Preprocessing

_INSTALL = {
    "open_clip": "pip install open_clip_torch",
    "onnx": "pip install numpy onnxruntime pillow tokenizers",
    "transformers": "pip install transformers torch torchvision pillow",
}
_ELSEWHERE = {
    "open_clip": """From the Hub, give `"hf-hub:"` and the name of this repository in place of `"local-dir:."`.""",
    "onnx": "From the Hub, `huggingface_hub.snapshot_download` fetches the folder.",
    "transformers": """From the Hub, give the name of this repository in place of `"."`.""",
}
_PROMPTS = 'classes = ["cat", "dog", "boat"]'


def usage(document: Export) -> list[str]:
    """The lines of the section: how to get the files, what to install, and a zero-shot classification."""
    code = {"open_clip": _open_clip, "onnx": _onnx, "transformers": _transformers}[document.format]
    return [
        "## How to use it",
        "",
        f"In the folder with these files, after `{_INSTALL[document.format]}`:",
        "",
        "```python",
        *code(document),
        "```",
        "",
        f"{_ELSEWHERE[document.format]} With dimefm, `dimefm predict . image.jpg --classes cat,dog,boat` does the "
        "same, and `dimefm evaluate . SET` measures the model on a labelled set.",
    ]


def _open_clip(document: Export) -> list[str]:
    alone = document.model.logit_bias is not None  # then each class has a probability of its own
    chances = "(logits + model.logit_bias).sigmoid()" if alone else "logits.softmax(dim=-1)"
    return f"""\
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenize = open_clip.get_tokenizer("local-dir:.")
model.eval()
{_PROMPTS}
with torch.inference_mode():
    image = model.encode_image(preprocess(Image.open("image.jpg").convert("RGB"))[None], normalize=True)
    texts = model.encode_text(tokenize([f"a photo of a {{name}}." for name in classes]), normalize=True)
    logits = (model.logit_scale.exp() * image @ texts.T)[0]
    probabilities = {chances}
print(dict(zip(classes, probabilities.tolist())))""".splitlines()


def _transformers(document: Export) -> list[str]:
    return f"""\
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model=".")
{_PROMPTS}
print(classify("image.jpg", candidate_labels=classes, hypothesis_template="a photo of a {{}}."))""".splitlines()


def _onnx(document: Export) -> list[str]:
    model, facts = document.model, document.model.preprocessing
    floats = document.onnx is None or document.onnx.image_input == "float32"
    pixels = ["pixels = np.asarray(image).transpose(2, 0, 1)[None]"]
    if floats:
        mean, std = (", ".join(f"{one:.9g}" for one in values) for values in (facts.mean, facts.std))
        pixels += [
            f"mean, std = [{mean}], [{std}]",
            "pixels = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))",
            "pixels = pixels.astype(np.float32)",
        ]
    chances = ["probabilities = np.exp(logits - logits.max())", "probabilities /= probabilities.sum()"]
    if model.logit_bias is not None:
        chances = [f"probabilities = 1 / (1 + np.exp(-(logits + {model.logit_bias:.9g})))"]
    return [
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image" + ", ImageOps" * any("ImageOps" in line for line in _resize(facts)),
        "from tokenizers import Tokenizer",
        "",
        f'vision, text = (onnxruntime.InferenceSession(name) for name in ("{IMAGE_ONNX}", "{TEXT_ONNX}"))',
        f'tokenizer = Tokenizer.from_file("{TOKENIZER_FILE}")',
        _PROMPTS,
        'image = Image.open("image.jpg").convert("RGB")',
        *_resize(facts),
        *pixels,
        'tokens = [one.ids for one in tokenizer.encode_batch([f"a photo of a {name}." for name in classes])]',
        '(image_embeds,) = vision.run(None, {"pixel_values": pixels})',
        '(text_embeds,) = text.run(None, {"input_ids": np.array(tokens, np.int64)})',
        f"logits = {model.logit_scale:.9g} * (image_embeds @ text_embeds.T)[0]",
        *chances,
        "print(dict(zip(classes, probabilities.tolist())))",
    ]


def _resize(facts: Preprocessing) -> list[str]:
    """Lines that bring `image` to the size that the model takes, as open_clip's own steps do."""
    height, width = facts.size
    way = f"Image.Resampling.{'BILINEAR' if facts.interpolation == 'bilinear' else 'BICUBIC'}"
    if facts.resize_mode == "squash":
        return [f"image = image.resize(({width}, {height}), {way})"]
    if facts.resize_mode == "longest":
        return [f"image = ImageOps.pad(image, ({width}, {height}), {way}, color={(facts.fill_color,) * 3})"]
    if height != width:
        return [f"image = ImageOps.fit(image, ({width}, {height}), {way})"]
    return [
        f"short, side = min(image.size), {height}",
        f"image = image.resize((side * image.width // short, side * image.height // short), {way})",
        "left, top = round((image.width - side) / 2), round((image.height - side) / 2)",
        "image = image.crop((left, top, left + side, top + side))",
    ]
