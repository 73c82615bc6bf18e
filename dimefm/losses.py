"""The losses of DIME-FM (Sun et al., ICCV 2023, arXiv:2303.18232) and a few others, as pure functions in float32 or
wider.

All embeddings are unit-norm. S(a, b) = scale * a @ b.T; KL_t(P, Q) is the mean over rows of
KL(softmax(P / t) || softmax(Q / t)), without the factor t^2 of other distillation work. Student logits have a scale of
their own, `student_scale`, which may be a tensor that is learned; where it is None it is that of the teacher.

Shapes: B images, Q images of a queue, R = B + Q, T texts, C texts of a chunk, D embedding width. Teacher tensors and
queues carry no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Scale = float | torch.Tensor

CHUNK_LOGITS, KEPT_LOGITS = 2**23, 2**26
"""Logits (images x texts) that vl_loss works on at once, a handful of matrices of 32 MiB in float32; and up to how many
it keeps those of teacher and student from its first pass over the texts to the second."""


def vl_loss(
    teacher_image_BD: torch.Tensor,
    teacher_text_TD: torch.Tensor,
    student_image_BD: torch.Tensor,
    *,
    scale: float,
    temperature: float,
    student_scale: Scale | None = None,
    queue: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Vision-language score distillation: KL(S(ti, tt), S(si, tt)) + KL(S(tt, ti), S(tt, si)).

    `queue`, teacher and student embeddings (Q, D) of earlier steps, adds images to the second term's softmax. The
    gradient is written out, (q - p) / rows for each softmax, and texts are taken in chunks: memory is bounded in T.
    """
    student_scale = scale if student_scale is None else student_scale
    learned = torch.as_tensor(student_scale, dtype=student_image_BD.dtype, device=student_image_BD.device)
    teacher_RD, queued_QD = teacher_image_BD, student_image_BD[:0]
    if queue is not None:
        teacher_RD, queued_QD = torch.cat([teacher_image_BD, queue[0]]), queue[1]
    value: torch.Tensor = _VisionLanguage.apply(
        student_image_BD, learned, queued_QD, teacher_RD, teacher_text_TD, scale, temperature
    )
    return value


class _VisionLanguage(torch.autograd.Function):
    """vl_loss, with its gradient computed beside its value: the logits are never kept for a backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student_BD: torch.Tensor,
        student_scale: torch.Tensor,
        queued_QD: torch.Tensor,
        teacher_RD: torch.Tensor,
        text_TD: torch.Tensor,
        scale: float,
        temperature: float,
    ) -> torch.Tensor:
        images, texts, factor = len(student_BD), len(text_TD), student_scale / temperature
        student_RD = torch.cat([student_BD, queued_QD]) if len(queued_QD) else student_BD
        chunks = text_TD.split(max(1, CHUNK_LOGITS // len(teacher_RD)))

        def logits(text_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return teacher_RD @ (text_CD.T * (scale / temperature)), student_RD @ (text_CD.T * factor)

        kept = list(map(logits, chunks)) if len(teacher_RD) * texts <= KEPT_LOGITS else None
        sums_t, sums_s = [], []  # by image, over all texts: the only thing that chunks must know of each other
        for teacher_RC, student_RC in kept or map(logits, chunks):
            sums_t.append(teacher_RC[:images].logsumexp(dim=1))
            sums_s.append(student_RC[:images].logsumexp(dim=1))
        sum_t_B1, sum_s_B1 = (torch.stack(sums).logsumexp(dim=0)[:, None] for sums in (sums_t, sums_s))

        loss, grad_scale, grad_BD = student_BD.new_zeros(()), student_BD.new_zeros(()), torch.zeros_like(student_BD)
        for text_CD, (teacher_RC, student_RC) in zip(chunks, kept or map(logits, chunks), strict=True):
            by_text, grad_RC = _kl_and_gradient(teacher_RC.log_softmax(dim=0), student_RC.log_softmax(dim=0), texts)
            by_image, grad_BC = _kl_and_gradient(teacher_RC[:images] - sum_t_B1, student_RC[:images] - sum_s_B1, images)
            grad_RC[:images] += grad_BC
            loss += by_text + by_image
            grad_BD.addmm_(grad_RC[:images], text_CD * factor)
            if student_scale.requires_grad:
                grad_scale += (grad_RC * student_RC).sum() / student_scale
        ctx.save_for_backward(grad_BD, grad_scale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_BD, grad_scale = ctx.saved_tensors
        return grad * grad_BD, grad * grad_scale, None, None, None, None, None


def _kl_and_gradient(log_p: torch.Tensor, log_q: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) summed and divided by `rows`, and its gradient by the logits of q. `log_p`, `log_q` are used up."""
    p = log_p.exp()
    value = torch.dot(p.flatten(), log_p.sub_(log_q).flatten()) / rows
    return value, log_q.exp_().sub_(p).div_(rows)


def pvl_loss(
    teacher_image_BD: torch.Tensor,
    student_image_BD: torch.Tensor,
    *,
    scale: float,
    temperature: float,
    student_scale: Scale | None = None,
    mask_diagonal: bool = False,
    queue: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Pseudo vision-language, the teacher's images in place of texts: 2 KL(S(ti, ti), S(si, ti)).

    `mask_diagonal` leaves each image's own embedding out, which otherwise has nearly all of the target's mass; a
    `queue` adds the teacher's embeddings of earlier steps.
    """
    keys = _with_queue(teacher_image_BD, teacher_image_BD, queue and (queue[0], queue[0]))
    return _between_images(teacher_image_BD, student_image_BD, keys, scale, student_scale, temperature, mask_diagonal)


def udist_loss(
    teacher_image_BD: torch.Tensor,
    student_image_BD: torch.Tensor,
    *,
    scale: float,
    temperature: float,
    student_scale: Scale | None = None,
    mask_diagonal: bool = False,
    queue: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Uni-modal distance preservation: 2 KL(S(ti, ti), S(si, si)); `mask_diagonal` and `queue` as in pvl_loss."""
    keys = _with_queue(teacher_image_BD, student_image_BD, queue)
    return _between_images(teacher_image_BD, student_image_BD, keys, scale, student_scale, temperature, mask_diagonal)


def cosine_loss(teacher_image_BD: torch.Tensor, student_image_BD: torch.Tensor) -> torch.Tensor:
    """Embedding regression: the mean of 1 - cos(si, ti), which is half the squared distance of unit vectors."""
    return 1 - (teacher_image_BD * student_image_BD).sum(dim=1).mean()


def centred_loss(teacher_image_BD: torch.Tensor, student_image_BD: torch.Tensor, mean_D: torch.Tensor) -> torch.Tensor:
    """Regression of what tells images apart: the mean of 1 - cos(si - m, ti - m), m the mean teacher embedding.

    CLIP's image embeddings share a large common direction (a mean cosine of about 0.5); 1 - cos is small once a student
    has learned that direction alone.
    """
    return 1 - F.cosine_similarity(student_image_BD - mean_D, teacher_image_BD - mean_D, dim=1).mean()


def contrastive_loss(
    student_image_BD: torch.Tensor, text_BD: torch.Tensor, text_row_B: torch.Tensor, *, scale: Scale
) -> torch.Tensor:
    """The task loss of CLIP (Radford et al. 2021) between each image and its own sentence: the mean of both
    directions' cross-entropies over the batch.

    `text_row_B` tells sentences apart: one that several images share is not a negative of any of them; -1 stands for
    an image without a sentence, which is left out.
    """
    paired = text_row_B >= 0
    row_P = text_row_B[paired]
    if not len(row_P):
        return student_image_BD.sum() * 0
    logits_PP = scale * student_image_BD[paired] @ text_BD[paired].T
    target_P = torch.arange(len(row_P), device=row_P.device)
    other = (row_P[:, None] == row_P) & ~torch.eye(len(row_P), dtype=torch.bool, device=row_P.device)
    logits_PP = logits_PP.masked_fill(other, float("-inf"))
    return (F.cross_entropy(logits_PP, target_P) + F.cross_entropy(logits_PP.T, target_P)) / 2


def _with_queue(
    teacher_BD: torch.Tensor, student_BD: torch.Tensor, queue: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of both sides, (R, D) each."""
    if queue is None:
        return teacher_BD, student_BD
    return torch.cat([teacher_BD, queue[0]]), torch.cat([student_BD, queue[1]])


def _between_images(
    teacher_BD: torch.Tensor,
    student_BD: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    student_scale: Scale | None,
    temperature: float,
    mask_diagonal: bool,
) -> torch.Tensor:
    """2 KL(S(teacher, its keys), S(student, its keys))."""
    student_scale = scale if student_scale is None else student_scale
    with torch.no_grad():
        teacher_BR = scale / temperature * teacher_BD @ keys[0].T
    return 2 * _kl(teacher_BR, student_scale / temperature * student_BD @ keys[1].T, mask_diagonal)


def _kl(teacher_BR: torch.Tensor, student_BR: torch.Tensor, mask_diagonal: bool) -> torch.Tensor:
    """Mean over rows of KL(softmax(teacher) || softmax(student)), without column b in row b if masked."""
    if mask_diagonal:
        own = torch.eye(*teacher_BR.shape, dtype=torch.bool, device=teacher_BR.device)
        lowest = torch.finfo(teacher_BR.dtype).min / 4  # not -inf: 0 * (inf - inf) is not 0
        teacher_BR, student_BR = teacher_BR.masked_fill(own, lowest), student_BR.masked_fill(own, lowest)
    with torch.no_grad():
        target = F.log_softmax(teacher_BR, dim=1)
    return F.kl_div(F.log_softmax(student_BR, dim=1), target, log_target=True, reduction="batchmean")
