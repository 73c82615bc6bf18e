"""A CLIPModel of Hugging Face's transformers as a Clip: an export, or any folder with a CLIPModel.

All is read from the folder, and nothing is fetched. No code from it is run: its weights are safetensors, and its
classes those of transformers. Shapes: B images or sentences, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache_schemas import Preprocessing, TeacherIdentity
from cache_schemas.export import TRANSFORMERS_IMAGES
from cache_schemas.identity import Precision
from dimefm.errors import TeacherError
from dimefm.models.clip import Clip, digest_weights
from dimefm.models.exported import NEEDS, require_packages

RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers of the interpolations, by which a preprocessor names them."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def load_transformers(folder: str, name: str, precision: Precision, device: str) -> Clip:
    """The model of a folder. Raises TeacherError for one that cannot be loaded, or whose images cannot be prepared as
    it wants them."""
    require_packages(NEEDS["transformers"], f"the transformers model {folder}")
    preprocessing = _preprocessing(folder)
    transformers: Any = import_module("transformers")
    loaded = _open_model(folder, transformers)
    side = loaded.config.vision_config.image_size
    if preprocessing.size != (side, side):
        what = f"{folder} prepares images of {preprocessing.size} px, and its image tower takes {side} px"
        raise TeacherError(what, remedy="mend the sizes in its preprocessor_config.json")
    with _strict(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    length, model = loaded.config.text_config.max_position_embeddings, _Model(loaded)
    identity = TeacherIdentity(
        name=name,
        pretrained=None,
        weights=digest_weights(model),
        activation=loaded.config.text_config.hidden_act,
        preprocessing=preprocessing,
        tokenizer=f"of transformers {_digest_files(folder)}",
        context_length=length,
        embed_dim=loaded.config.projection_dim,
        precision=precision,
        logit_scale=float(model.logit_scale.detach().exp()),
        logit_bias=None,
    )
    return Clip(model, _Tokens(tokenizer, length), identity, {"embed_dim": identity.embed_dim}, device)


class _Model(nn.Module):
    """The towers of a CLIPModel, with open_clip's names of what they do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = _Tower(model.vision_model, model.visual_projection)
        self.text = _Tower(model.text_model, model.text_projection)
        self.logit_scale: nn.Parameter = model.logit_scale

    def encode_image(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self.visual(pixel_values=pixels_B3HW)  # type: ignore[no-any-return]

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return self.text(input_ids=tokens_BL)  # type: ignore[no-any-return]


class _Tower(nn.Module):
    """What `get_image_features` and `get_text_features` do, which give other things in transformers 4 and 5."""

    def __init__(self, model: Any, projection: Any) -> None:
        super().__init__()
        self.model, self.projection = model, projection

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.projection(self.model(**inputs).pooler_output)  # type: ignore[no-any-return]


class _Tokens:
    """The tokenizer of a folder, called as open_clip's are."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Sentences to int64 (B, L)."""
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.long)
        made = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return made.input_ids  # type: ignore[no-any-return]


def _open_model(folder: str, transformers: Any) -> Any:
    """The CLIPModel in float32. Raises TeacherError unless the folder has all of its weights, and no others."""
    with _strict(folder):
        model, found = transformers.CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    names = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if wrong := [name for name in names if not name.endswith("position_ids")]:  # older releases wrote these too
        what = f"{folder} has other weights than its config.json says, first {wrong[0]} ({len(wrong)})"
        raise TeacherError(what, remedy="export or download the model again")
    acts = {model.config.vision_config.hidden_act, model.config.text_config.hidden_act}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        what = f"the towers of {folder} have the activation {' and '.join(sorted(acts))}"
        raise TeacherError(what, remedy="give a model with gelu, or quick_gelu, in both towers")
    return model


@contextmanager
def _strict(folder: str) -> Iterator[None]:
    """Within the block transformers prints nothing, and what it raises becomes a TeacherError."""
    logging: Any = import_module("transformers.utils.logging")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # transformers and safetensors raise many kinds; all mean that it cannot be had
        reason = str(error).strip().split("\n")[0]
        remedy = "give a folder with config.json, model.safetensors, tokenizer.json and preprocessor_config.json"
        raise TeacherError(f"{folder} cannot be loaded as a CLIPModel: {reason}", remedy=remedy) from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _digest_files(folder: str) -> str:
    """sha256 of the files that decide the tokens, as hex, shortened."""
    digest = hashlib.sha256()
    for path in (Path(folder, name) for name in _TOKENIZER_FILES):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _preprocessing(folder: str) -> Preprocessing:
    """How its files say that images are prepared, if that can be done here. A CLIPProcessor that transformers 5 has
    saved is one file with all of its parts."""
    path, whole = Path(folder, TRANSFORMERS_IMAGES), Path(folder, "processor_config.json")
    try:
        if path.is_file():
            known = _known(json.loads(path.read_text(encoding="utf-8")))
        else:
            known = _known(json.loads(whole.read_text(encoding="utf-8"))["image_processor"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = None
    if known is None:
        what = f"{path} is not there, or prepares images in a way that dimefm does not know"
        remedy = "give a model whose images are resized by their shortest side and cropped, or resized to a square"
        raise TeacherError(what, remedy=remedy)
    return known


def _known(found: dict[str, Any]) -> Preprocessing | None:
    """The preprocessing of a preprocessor_config.json. What is not in it is as transformers has it by default."""
    crops, size, crop = found.get("do_center_crop", True), found.get("size", 224), found.get("crop_size", 224)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = crop if crops else size
    sides = (sides["height"], sides["width"]) if isinstance(sides, dict) else (sides, sides)
    steps = all(found.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
    by_255 = abs(found.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6
    if not (steps and by_255 and found.get("resample", 3) in RESAMPLE.values() and shortest in (sides[0], None)):
        return None
    if crops and (shortest is None or sides[0] != sides[1]):
        return None
    return Preprocessing(
        size=sides,
        mean=tuple(map(float, found["image_mean"])),
        std=tuple(map(float, found["image_std"])),
        interpolation="bilinear" if found.get("resample", 3) == RESAMPLE["bilinear"] else "bicubic",
        resize_mode="shortest" if crops else "squash",
    )
