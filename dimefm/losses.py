"""The losses of DIME-FM (Sun et al., ICCV 2023, arXiv:2303.18232), as pure functions in float32 or wider.

All embeddings are unit-norm. S(a, b) = scale * a @ b.T; KL_t(P, Q) is the mean over rows of
KL(softmax(P / t) || softmax(Q / t)), without the factor t^2 of other distillation work.

Shapes: B images, T texts, D embedding width. Teacher tensors carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and temperatures; the defaults are the paper's released recipe.

    Not of the paper: `cosine`, plain regression of the cached embedding, and `centred`, the same after the mean of the
    teacher's image embeddings is taken off both sides.
    """

    CONSTANTS: ClassVar[frozenset[str]] = frozenset({"vl_temperature", "pvl_temperature", "udist_temperature", "scale"})

    vl: float = 0.7
    pvl: float = 0.3
    udist: float = 0.0
    cosine: float = 0.0
    centred: float = 0.0
    vl_temperature: float = 1.0
    pvl_temperature: float = 3.0
    udist_temperature: float = 7.0
    scale: float = 100.0


def vl_loss(
    teacher_image_BD: torch.Tensor,
    teacher_text_TD: torch.Tensor,
    student_image_BD: torch.Tensor,
    *,
    scale: float,
    temperature: float,
) -> torch.Tensor:
    """Vision-language score distillation: KL(S(ti, tt), S(si, tt)) + KL(S(tt, ti), S(tt, si)).

    Both directions share one student logit matrix: rows are images, columns are texts.
    """
    factor = scale / temperature
    with torch.no_grad():
        teacher_BT = factor * teacher_image_BD @ teacher_text_TD.T
    student_BT = factor * student_image_BD @ teacher_text_TD.T
    return _kl(teacher_BT, student_BT, dim=1) + _kl(teacher_BT, student_BT, dim=0)


def pvl_loss(
    teacher_image_BD: torch.Tensor, student_image_BD: torch.Tensor, *, scale: float, temperature: float
) -> torch.Tensor:
    """Pseudo vision-language, the teacher's images in place of texts: 2 KL(S(ti, ti), S(si, ti))."""
    factor = scale / temperature
    with torch.no_grad():
        teacher_BB = factor * teacher_image_BD @ teacher_image_BD.T
    return 2 * _kl(teacher_BB, factor * student_image_BD @ teacher_image_BD.T, dim=1)


def udist_loss(
    teacher_image_BD: torch.Tensor, student_image_BD: torch.Tensor, *, scale: float, temperature: float
) -> torch.Tensor:
    """Uni-modal distance preservation: 2 KL(S(ti, ti), S(si, si))."""
    factor = scale / temperature
    with torch.no_grad():
        teacher_BB = factor * teacher_image_BD @ teacher_image_BD.T
    return 2 * _kl(teacher_BB, factor * student_image_BD @ student_image_BD.T, dim=1)


def cosine_loss(teacher_image_BD: torch.Tensor, student_image_BD: torch.Tensor) -> torch.Tensor:
    """Embedding regression: the mean of 1 - cos(si, ti)."""
    return 1 - (teacher_image_BD * student_image_BD).sum(dim=1).mean()


def centred_loss(teacher_image_BD: torch.Tensor, student_image_BD: torch.Tensor, mean_D: torch.Tensor) -> torch.Tensor:
    """Regression of what tells images apart: the mean of 1 - cos(si - m, ti - m), m the mean teacher embedding.

    CLIP's image embeddings share a large common direction (a mean cosine of about 0.5); 1 - cos is small once a student
    has learned that direction alone.
    """
    return 1 - F.cosine_similarity(student_image_BD - mean_D, teacher_image_BD - mean_D, dim=1).mean()


def distillation_loss(
    teacher_image_BD: torch.Tensor,
    teacher_text_TD: torch.Tensor | None,
    student_image_BD: torch.Tensor,
    config: LossConfig,
    mean_D: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of all losses with a weight, and each of them unweighted and detached.

    `teacher_text_TD` may be None where vl has no weight, and `mean_D` where centred has none.
    """
    teacher, student, scale = teacher_image_BD, student_image_BD, config.scale
    parts: dict[str, tuple[float, torch.Tensor]] = {}
    if config.vl:
        if teacher_text_TD is None:
            raise ValueError("the vl loss needs text embeddings")
        value = vl_loss(teacher, teacher_text_TD, student, scale=scale, temperature=config.vl_temperature)
        parts["vl"] = (config.vl, value)
    if config.pvl:
        parts["pvl"] = (config.pvl, pvl_loss(teacher, student, scale=scale, temperature=config.pvl_temperature))
    if config.udist:
        value = udist_loss(teacher, student, scale=scale, temperature=config.udist_temperature)
        parts["udist"] = (config.udist, value)
    if config.cosine:
        parts["cosine"] = (config.cosine, cosine_loss(teacher, student))
    if config.centred:
        if mean_D is None:
            raise ValueError("the centred loss needs the mean embedding")
        parts["centred"] = (config.centred, centred_loss(teacher, student, mean_D))
    if not parts:
        raise ValueError("every loss has weight 0")
    total = torch.stack([weight * value for weight, value in parts.values()]).sum()
    return total, {name: value.detach() for name, (_, value) in parts.items()}


def _kl(teacher: torch.Tensor, student: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Mean over the other dimension of KL(softmax(teacher) || softmax(student)) along `dim`."""
    with torch.no_grad():
        target = F.log_softmax(teacher, dim=dim)
    pointwise = F.kl_div(F.log_softmax(student, dim=dim), target, log_target=True, reduction="sum")
    return pointwise / teacher.shape[1 - dim]
