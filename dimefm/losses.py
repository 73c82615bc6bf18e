"""The losses of DIME-FM (Sun et al., ICCV 2023, arXiv:2303.18232) and a few others, as functions in float32 or wider.

All embeddings are unit-norm. S(a, b) = scale * a @ b.T; KL_t(P, Q) is the mean over rows of
KL(softmax(P / t) || softmax(Q / t)), without the factor t^2 of other distillation work. Student logits have a scale of
their own, `student_scale`, which may be a tensor that is learned; where it is None it is that of the teacher.

Of several processes, each has the student's rows of its own images: rank, rank + world, ... of the global batch. With
`place` a loss is this process's part of the global one: its mean over processes is the loss, and the mean of the
gradients that they find, which is what DistributedDataParallel makes of them, is the gradient of one process with
the whole batch. All processes must have equally many images.

On a GPU the products are TF32 (see dimefm.products): exact in the teacher's embeddings, which are float16 numbers, and
with the student's rounded to 10 bits of mantissa. A student logit, the sum of D products of about scale / D, is off by
about scale * 2^-12 / sqrt(D). Measured by rounding so on a CPU, at scale 100, D = 768, 256 images and 4,096 texts:
8e-4 a logit (root mean square; 4e-3 at worst) and 7e-4 of the gradient's norm; with bits cut off instead of rounded
3e-3 (1e-2) and 1e-3. The features of a tower that computes in bf16 are off by 6e-3 (3e-2) and 5e-3 before.
Nothing waits for the GPU.

Shapes: B images of this process, G of all processes, Q images of a queue, T texts, D embedding width. R rows, K keys
that they are compared with, C keys of a chunk. Teacher tensors and queues carry no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dimefm.distributed import ALONE, Place, gather_batch, logsumexp_over_all
from dimefm.products import similarities, tf32

Scale = float | torch.Tensor
Queue = tuple[torch.Tensor, torch.Tensor]

CHUNK_LOGITS, CUDA_CHUNK_LOGITS, KEPT_LOGITS = 2**23, 2**26, 2**26
"""Logits (rows x keys) that vl, pvl and udist work on at once, a handful of matrices of 32 MiB in float32, on a GPU of
256 MiB; and up to how many they keep those of teacher and student from the first pass over the keys to the second."""


def vl_loss(
    teacher_BD: torch.Tensor,
    text_TD: torch.Tensor,
    student_BD: torch.Tensor,
    *,
    scale: float,
    temperature: float,
    student_scale: Scale | None = None,
    queue: Queue | None = None,
    place: Place = ALONE,
) -> torch.Tensor:
    """Vision-language score distillation: KL(S(ti, tt), S(si, tt)) + KL(S(tt, ti), S(tt, si)).

    `queue`, teacher and student embeddings (Q, D) of earlier steps, adds images to the second term's softmax.
    """
    teacher_RD, queued_QD = teacher_BD, None
    if queue is not None:  # each process takes its part of the queue, as of the batch
        teacher_RD, queued_QD = torch.cat([teacher_BD, queue[0][place.rows]]), queue[1][place.rows]
    return _softmax_kl(
        (teacher_RD, text_TD), (student_BD, text_TD), scale, student_scale, temperature,
        queued_QD=queued_QD, by_key=True, place=place,
    )  # fmt: skip


def pvl_loss(
    teacher_GD: torch.Tensor,
    student_BD: torch.Tensor,
    *,
    scale: float,
    temperature: float,
    student_scale: Scale | None = None,
    mask_diagonal: bool = False,
    queue: Queue | None = None,
    place: Place = ALONE,
) -> torch.Tensor:
    """Pseudo vision-language, the teacher's images in place of texts: 2 KL(S(ti, ti), S(si, ti)).

    `mask_diagonal` leaves each image's own embedding out, which otherwise has nearly all of the target's mass; a
    `queue` adds the teacher's embeddings of earlier steps.
    """
    key_KD = teacher_GD if queue is None else torch.cat([teacher_GD, queue[0]])
    return 2 * _softmax_kl(
        (teacher_GD[place.rows], key_KD), (student_BD, key_KD), scale, student_scale, temperature,
        without_own=mask_diagonal, place=place,
    )  # fmt: skip


def udist_loss(
    teacher_GD: torch.Tensor,
    student_BD: torch.Tensor,
    *,
    scale: float,
    temperature: float,
    student_scale: Scale | None = None,
    mask_diagonal: bool = False,
    queue: Queue | None = None,
    place: Place = ALONE,
) -> torch.Tensor:
    """Uni-modal distance preservation: 2 KL(S(ti, ti), S(si, si)); `mask_diagonal` and `queue` as in pvl_loss."""
    teacher_KD, student_KD = teacher_GD, gather_batch(student_BD, place)
    if queue is not None:
        teacher_KD, student_KD = torch.cat([teacher_KD, queue[0]]), torch.cat([student_KD, queue[1]])
    return 2 * _softmax_kl(
        (teacher_GD[place.rows], teacher_KD), (student_BD, student_KD), scale, student_scale, temperature,
        without_own=mask_diagonal, place=place,
    )  # fmt: skip


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
    student_BD: torch.Tensor, text_GD: torch.Tensor, text_row_G: torch.Tensor, *, scale: Scale, place: Place = ALONE
) -> torch.Tensor:
    """The task loss of CLIP (Radford et al. 2021) between each image and its own sentence: the mean of both
    directions' cross-entropies over the batch.

    `text_row_G` tells sentences apart: one that several images share is not a negative of any of them; -1 stands for
    an image without a sentence, which is left out. Every process computes it whole, on G x G logits.
    """
    none_G = text_row_G < 0
    left_out_GG = (text_row_G[:, None] == text_row_G) | none_G[:, None] | none_G
    left_out_GG.fill_diagonal_(False)  # so that the cross-entropy of an image without a sentence is 0
    logits_GG = similarities(scale * gather_batch(student_BD, place), text_GD)
    logits_GG = logits_GG.masked_fill(left_out_GG, -torch.inf)
    target_G = torch.arange(len(text_GD), device=text_GD.device)
    by_image, by_text = (F.cross_entropy(m, target_G, reduction="sum") for m in (logits_GG, logits_GG.T))
    return (by_image + by_text) / (2 * (~none_G).sum().clamp(min=1))


def _softmax_kl(
    teacher: tuple[torch.Tensor, torch.Tensor],
    student: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    student_scale: Scale | None,
    temperature: float,
    *,
    queued_QD: torch.Tensor | None = None,
    by_key: bool = False,
    without_own: bool = False,
    place: Place,
) -> torch.Tensor:
    """KL of the student's softmaxes over keys from the teacher's, the mean over rows; `teacher` and `student` are the
    rows and keys of each.

    With `by_key` that of the softmaxes over the rows of all processes is added, the mean over keys; the student's
    `queued_QD` are rows in these alone. `without_own` leaves a row's own image, which is one of the keys, out.
    """
    factor = (scale if student_scale is None else student_scale) / temperature
    with tf32(student[0].device):
        value: torch.Tensor = _SoftmaxKL.apply(
            *student, factor, queued_QD, *teacher, scale / temperature, by_key, without_own, place
        )
    return value


class _SoftmaxKL(torch.autograd.Function):
    """_softmax_kl, with its gradient computed beside its value.

    The gradient is written out, (q - p) / rows for each softmax, and keys are taken in chunks, first for the sums of
    all softmaxes and then for the rest: memory is bounded, and no logits are kept for a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_BD: torch.Tensor,
        student_KD: torch.Tensor,
        factor: Scale,
        queued_QD: torch.Tensor | None,
        teacher_RD: torch.Tensor,
        teacher_KD: torch.Tensor,
        teacher_factor: float,
        by_key: bool,
        without_own: bool,
        place: Place,
    ) -> torch.Tensor:
        images, rows, keys = len(student_BD), len(teacher_RD), len(teacher_KD)
        student_RD = factor * (student_BD if queued_QD is None else torch.cat([student_BD, queued_QD]))
        width = max(1, (CUDA_CHUNK_LOGITS if student_BD.is_cuda else CHUNK_LOGITS) // rows)
        chunks = [slice(at, min(at + width, keys)) for at in range(0, keys, width)]
        nothing = teacher_RD.new_zeros(())

        def logits(chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            teacher_RC = torch.addmm(nothing, teacher_RD, teacher_KD[chunk].T, beta=0, alpha=teacher_factor)
            student_RC = student_RD @ student_KD[chunk].T
            if without_own:
                _leave_out_own(teacher_RC, chunk.start, place)
                _leave_out_own(student_RC, chunk.start, place)
            return teacher_RC, student_RC

        kept = list(map(logits, chunks)) if rows * keys <= KEPT_LOGITS else None
        by_row, over_rows = [], []
        for both in kept or map(logits, chunks):
            by_row.append(torch.stack([logits_RC[:images].logsumexp(dim=1) for logits_RC in both]))
            if by_key:
                over_rows.append(torch.stack([logits_RC.logsumexp(dim=0) for logits_RC in both]))
        sum_t_B1, sum_s_B1 = torch.stack(by_row).logsumexp(dim=0)[..., None]
        if by_key:
            sum_t_K, sum_s_K = logsumexp_over_all(torch.cat(over_rows, dim=1), place)

        value, grad_BD = torch.zeros_like(nothing), torch.zeros_like(student_BD)
        grad_KD = torch.empty_like(student_KD) if ctx.needs_input_grad[1] else None
        grad_factor = torch.zeros_like(nothing) if ctx.needs_input_grad[2] else None
        for chunk, (teacher_RC, student_RC) in zip(chunks, kept or map(logits, chunks), strict=True):
            part, grad_RC = _kl_and_gradient(teacher_RC[:images] - sum_t_B1, student_RC[:images] - sum_s_B1, 1 / images)
            value += part
            if by_key:
                grad_BC, weight = grad_RC, place.world / keys
                part, grad_RC = _kl_and_gradient(teacher_RC - sum_t_K[chunk], student_RC - sum_s_K[chunk], weight)
                value += part
                grad_RC[:images] += grad_BC
            grad_BD.addmm_(grad_RC[:images], student_KD[chunk])
            if grad_KD is not None:
                grad_KD[chunk] = grad_RC.T @ student_RD
            if grad_factor is not None:
                grad_factor += torch.dot(grad_RC.flatten(), student_RC.flatten()) / factor
        ctx.save_for_backward(grad_BD.mul_(factor), grad_KD, grad_factor)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if found is None else grad * found for found in ctx.saved_tensors), *[None] * 7


def _leave_out_own(logits_BC: torch.Tensor, start: int, place: Place) -> None:
    """Row b is image rank + b * world of all, and so is its own key; the chunk begins at key `start`."""
    first = max(0, math.ceil((start - place.rank) / place.world))
    own = logits_BC[first:, place.rank + first * place.world - start :: place.world].diagonal()
    own.fill_(torch.finfo(own.dtype).min / 4)  # not -inf: 0 * (inf - inf) is not 0


def _kl_and_gradient(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` times the sum of KL(p || q), and its gradient by the logits of q. `log_p`, `log_q` are used up."""
    p = log_p.exp()
    value = torch.dot(p.flatten(), log_p.sub_(log_q).flatten()) * weight
    return value, log_q.exp_().sub_(p).mul_(weight)
