"""A plain zero-shot check that uses only open_clip, so that the teacher's numbers do not depend on dimefm's evaluation.

One prompt per class, "a photo of a X.", open_clip's own preprocessing, float32.

Shapes: B images, C classes, D embedding width.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image

from dimefm.sample.archive import read_tars

BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """The share of images, in percent, whose class is the best, or one of the best five."""

    images: int
    top1: float
    top5: float

    def __str__(self) -> str:
        return f"top-1 {self.top1:.1f}, top-5 {self.top5:.1f} on {self.images:,} images"


@torch.inference_mode()
def zero_shot(teacher: Path, labelled: Path) -> Accuracy:
    """The accuracy of the open_clip folder `teacher` on `labelled`, a folder with classnames.txt and tars of key.jpg
    and key.cls."""
    name = f"local-dir:{teacher.absolute()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    names = (labelled / "classnames.txt").read_text(encoding="utf-8").splitlines()
    prompts = open_clip.get_tokenizer(name)([f"a photo of a {n}." for n in names])
    classes_CD = model.encode_text(prompts, normalize=True)
    samples = [sample for _, sample in read_tars("*.tar", labelled)]
    hits = torch.zeros(2)
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        pixels = torch.stack(
            [preprocess(Image.open(io.BytesIO(s["jpg"]), formats=["JPEG"]).convert("RGB")) for s in batch]
        )
        scores_BC = model.encode_image(pixels, normalize=True) @ classes_CD.T
        labels_B1 = torch.tensor([[int(s["cls"])] for s in batch])
        right = scores_BC.topk(5).indices == labels_B1
        hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    top1, top5 = (100 * hits / len(samples)).tolist()
    return Accuracy(len(samples), top1, top5)
