"""The check after writing: the exported folder, loaded as a user loads it, against the PyTorch model that it was made
of, on real images, sentences and labelled sets.

Shapes: B images or sentences, N images of a set, C classes, D embedding width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dimefm.datasets.image_set import ImageSet
from dimefm.errors import DimefmError
from dimefm.evaluation.features import compute_features
from dimefm.evaluation.intervals import difference_interval
from dimefm.evaluation.metrics import topk_correct
from dimefm.evaluation.scoring import cosines
from dimefm.evaluation.text_embeddings import TextEmbeddings
from dimefm.export.check_material import Material
from dimefm.export.config import ExportConfig
from dimefm.images.decode import DecodeError
from dimefm.images.preprocess import Preprocess
from dimefm.models.clip import Clip, load_clip
from dimefm.system.notes import note
from dimefm.system.wording import counted

LEAST_COSINE = {"fp32": 0.99999, "fp16": 0.999}
"""Of any image and sentence, between the exported model and the PyTorch model."""
_ROUNDING = 1e-4  # of cosines: two classes nearer than this to each other are told apart by the order of sums
_BATCH = 32


@dataclass(frozen=True)
class Top1:
    """The zero-shot accuracy on a set, in [0, 1], of the PyTorch model and of the exported one; the 95% interval of the
    difference; and how many images have another class, those aside for which the PyTorch model has two that are nearly
    equal."""

    name: str
    images: int
    before: float
    after: float
    difference: tuple[float, float]
    other_class: int

    @property
    def loss(self) -> float:
        """Points of accuracy that the exported model has less."""
        return round(100 * (self.before - self.after), 6)

    def __str__(self) -> str:
        low, high = (100 * value for value in self.difference)
        change = f"{0 - self.loss:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"
        what = f"top-1 {100 * self.before:.1f} -> {100 * self.after:.1f} on {self.name}"
        return f"{what} ({counted(self.images, 'image')}, each {100 / self.images:.2g} points; {change})"


def check(clip: Clip, folder: Path, material: Material, config: ExportConfig) -> dict[str, float]:
    """How the model in `folder` differs from `clip`, which it was made of. Raises DimefmError, with the figures, unless
    they agree; after `int8` it is the loss in accuracy that counts.

    Names of the figures: `images` and `texts` that were compared, the smallest `image_cosine` and `text_cosine`, and of
    each labelled set `images/NAME`, `pytorch_top1/NAME` and `top1/NAME`.
    """
    note(f"checking the {config.format} model on {counted(len(material.images), 'image')} ...")
    exported = load_clip(f"local-dir:{folder}", precision="fp32", device="cpu")
    pixels_B3HW = _pixels(clip, material.images)
    texts = [list(material.texts[at : at + _BATCH]) for at in range(0, len(material.texts), _BATCH)]
    cosine = {
        "image": _smallest_cosine(clip.encode_images, exported.encode_images, pixels_B3HW.split(_BATCH)),
        "text": _smallest_cosine(clip.encode_texts, exported.encode_texts, texts),
    }
    sets = [compare_top1(clip, exported, labelled) for labelled in material.labelled]
    if config.int8:
        _require_small_loss(sets, config)
    else:
        _require_agreement(cosine, sets, config)
    figures: dict[str, float] = {"images": len(pixels_B3HW), "texts": len(material.texts)}
    figures |= {f"{kind}_cosine": value for kind, value in cosine.items()}
    for one in sets:
        values = {"images": one.images, "pytorch_top1": one.before, "top1": one.after}
        figures |= {f"{name}/{one.name}": value for name, value in values.items()}
    return figures


def top1(clip: Clip, labelled: ImageSet) -> float:
    """The zero-shot accuracy of a model on a set, as `dimefm evaluate` measures it, in [0, 1]."""
    return float(_correct(class_cosines(clip, labelled), labelled).mean())


def compare_top1(clip: Clip, exported: Clip, labelled: ImageSet) -> Top1:
    """The accuracy of both models on a set."""
    before_NC, after_NC = class_cosines(clip, labelled), class_cosines(exported, labelled)
    before_N, after_N = (_correct(cosine_NC, labelled) for cosine_NC in (before_NC, after_NC))
    chosen_N1 = np.nan_to_num(after_NC, nan=-2).argmax(axis=1)[:, None]
    worse_N = before_NC.max(axis=1) - np.take_along_axis(before_NC, chosen_N1, axis=1)[:, 0]  # NaN if unreadable
    return Top1(
        name=labelled.name,
        images=len(before_N),
        before=float(before_N.mean()),
        after=float(after_N.mean()),
        difference=difference_interval(before_N, after_N),
        other_class=int((worse_N > _ROUNDING).sum()),
    )


def class_cosines(clip: Clip, labelled: ImageSet) -> np.ndarray[Any, Any]:
    """The cosine of each image to each class, float32 (N, C); NaN for images that cannot be read."""
    with tempfile.TemporaryDirectory() as scratch:
        features = compute_features(clip, labelled, f"{scratch}/features")
        return cosines(features, TextEmbeddings(clip, scratch).of_classes(labelled.classnames, labelled.prompts()))


def _correct(cosine_NC: np.ndarray[Any, Any], labelled: ImageSet) -> np.ndarray[Any, Any]:
    return topk_correct(cosine_NC, labelled.class_labels, 1, among=min(5, cosine_NC.shape[1]))


def _require_small_loss(sets: Sequence[Top1], config: ExportConfig) -> None:
    for one in sets:
        note(f"int8: {one}")
    worst = max(sets, key=lambda one: one.loss)
    if worst.loss > config.max_loss and not config.accept:
        what = f"--int8 loses {worst.loss:.2f} points, more than {config.max_loss:g}: {worst}"
        raise DimefmError(what, remedy="leave --int8 out, raise --max-loss, or give --accept to write it all the same")


def _require_agreement(cosine: dict[str, float], sets: Sequence[Top1], config: ExportConfig) -> None:
    least = LEAST_COSINE[config.precision]
    wrong = [
        f"a smallest cosine of {kind}s of {value:.6f}, less than {least:g}"
        for kind, value in cosine.items()
        if not value >= least  # NaN too
    ]
    if config.precision == "fp32":
        wrong += [
            f"another class for {one.other_class:,} of {counted(one.images, 'image')} of {one.name}"
            for one in sets
            if one.other_class
        ]
    if wrong:
        what = f"the {config.format} model does not agree with {config.source}: it has {', and '.join(wrong)}"
        others = "--precision fp32" if config.precision == "fp16" else "--format open_clip"
        raise DimefmError(what, remedy=f"give {others}")


def _pixels(clip: Clip, images: Sequence[bytes]) -> torch.Tensor:
    """uint8 (B, 3, H, W) of the images that can be decoded."""
    preprocess, found = Preprocess(clip.identity.preprocessing, exact=True), []
    for data in images:
        with suppress(DecodeError):
            found.append(preprocess(data))
    if not found:
        raise DimefmError("no image can be decoded to check the model on", remedy="give --check-on another SET")
    return torch.stack(found)


def _smallest_cosine(
    one: Callable[[Any], torch.Tensor], other: Callable[[Any], torch.Tensor], parts: Sequence[Any]
) -> float:
    """Of embeddings by two models; NaN where one is not finite."""
    found = [torch.cosine_similarity(one(part).double(), other(part).double(), dim=1) for part in parts]
    return float(torch.cat(found).min())
