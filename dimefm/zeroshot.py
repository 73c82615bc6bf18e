"""Zero-shot classification: class embeddings from prompts, accuracy from cosine.

Shapes: N images of a set, B of a batch, k = 5 or fewer, C classes, P prompts of a class, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dimefm.labelled import LabelledSet


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy in [0, 1] over all `images`; one that cannot be read counts as wrong and has the prediction -1."""

    images: int
    classes: int
    top1: float
    top5: float
    unreadable: int
    predictions: tuple[int, ...]

    @property
    def times_chance(self) -> float:
        """top-1 over 1 / classes."""
        return self.top1 * self.classes


def class_embeddings(prompts: list[list[str]], embed: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
    """Unit-norm (C, D): the mean over templates of each class's unit-norm prompt embeddings, normalised again.

    `embed` gives unit-norm embeddings (P, D) of the prompts of one class.
    """
    return F.normalize(torch.stack([embed(texts).float().mean(dim=0) for texts in prompts]), dim=-1)


def zero_shot(
    labelled: LabelledSet,
    classes_CD: torch.Tensor,
    embed: Callable[[torch.Tensor], torch.Tensor],
    preprocess: Callable[[bytes], torch.Tensor],
    batch_size: int = 64,
) -> ZeroShot:
    """Top-1 and top-5 by largest cosine. `embed` takes uint8 (B, 3, H, W) to unit-norm (B, D)."""
    total, k = len(labelled.items), min(5, len(classes_CD))
    top_Nk = torch.full((total, k), -1)
    for pixels_B3HW, places_B in labelled.batches(preprocess, batch_size):
        scores_BC = embed(pixels_B3HW).float() @ classes_CD.T
        top_Nk[places_B] = scores_BC.topk(k, dim=1).indices.cpu()
    hits_Nk = top_Nk == torch.tensor([item.label for item in labelled.items])[:, None]
    return ZeroShot(
        images=total,
        classes=len(classes_CD),
        top1=hits_Nk[:, 0].float().mean().item(),
        top5=hits_Nk.any(dim=1).float().mean().item(),
        unreadable=int((top_Nk[:, 0] < 0).sum()),
        predictions=tuple(top_Nk[:, 0].tolist()),
    )
