"""Why embeddings of others differ from the teacher's: tries other ways to preprocess their images.

Shapes: N images, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import ImageOps

from cache_schemas import Preprocessing
from cache_schemas.identity import Interpolation, ResizeMode
from dimefm.images.decode import DecodeError, decode_pillow
from dimefm.images.preprocess import NORMS, Preprocess
from dimefm.models.clip import Clip

_ORIENTATION = 0x0112  # a tag of EXIF
_TURNED = "turned by their EXIF orientation, which is not followed here"
_MODES: dict[ResizeMode, str] = {
    "squash": "squashed to the square",
    "shortest": "cropped at their middle",
    "longest": "padded to the square",
}
_KERNELS: tuple[Interpolation, ...] = ("bicubic", "bilinear")


def likely_cause(clip: Clip, images: Sequence[bytes], embedding_ND: np.ndarray[Any, Any], least: float) -> str:
    """How these images were preprocessed, if one of the ways tried reproduces their embeddings to a mean cosine of
    `least`; else how many of them have an EXIF orientation. Empty where neither is known."""
    try:
        opened = [decode_pillow(data) for data in images]
    except DecodeError:
        return ""
    oriented = sum(image.getexif().get(_ORIENTATION, 1) != 1 for image in opened)
    upright = [ImageOps.exif_transpose(image) for image in opened] if oriented else []
    guesses = list(_guesses(clip.identity.preprocessing))
    tries = [(upright, [_TURNED], clip.identity.preprocessing)] if oriented else []
    tries += [(opened, [what], facts) for what, facts in guesses]
    tries += [(upright, [_TURNED, what], facts) for what, facts in guesses if oriented]
    for seen, what, facts in tries:
        preprocess = Preprocess(facts, exact=True)
        identity = replace(clip.identity, preprocessing=facts)
        other = Clip(clip.model, clip.tokenizer, identity, clip.model_cfg, str(clip.device))
        found_ND = other.encode_images(torch.stack([preprocess.apply(image) for image in seen])).cpu().numpy()
        cosine = float((found_ND * embedding_ND).sum(axis=1).mean())
        if cosine >= least:
            return f"they fit (mean cosine {cosine:.4f}) if the images are {' and '.join(what)}"
    return f"{oriented} of the images have an EXIF orientation, which is not followed here" if oriented else ""


def _guesses(facts: Preprocessing) -> Iterator[tuple[str, Preprocessing]]:
    """Other ways to preprocess, each with one setting changed, after words for it."""
    for mode, what in _MODES.items():
        if mode != facts.resize_mode:
            yield what, replace(facts, resize_mode=mode)
    for kernel in _KERNELS:
        if kernel != facts.interpolation:
            yield f"resized by {kernel} interpolation", replace(facts, interpolation=kernel)
    for whose, (mean, std) in NORMS.items():
        if (mean, std) != (facts.mean, facts.std):
            yield f"normalised by {whose} mean and deviation", replace(facts, mean=mean, std=std)
