"""The losses of DIME-FM (Sun et al., ICCV 2023, arXiv:2303.18232) and a few others, as functions in float32 or wider.

All embeddings are unit-norm. S(a, b) = scale * a @ b.T; KL_t(P, Q) is the mean over rows of
KL(softmax(P / t) || softmax(Q / t)), without the factor t^2 of other distillation work. Student logits have a scale of
their own, `student_scale`, which may be a learned tensor; None means the teacher's.

With several processes, each has the student's rows of its own images: rank, rank + world, ... of the global batch. With
`place` a loss is this process's part of the global one: the mean of the parts over processes is the loss, and the mean
of their gradients, which DistributedDataParallel computes, is the gradient that one process would find with the whole
batch. All processes must have equally many images.

On a GPU the products are TF32 (see system.matrix_products): exact in the teacher's embeddings, which are float16
numbers, and with the student's rounded to 10 bits of mantissa. A student logit, the sum of D products of about scale /
D each, is off by about scale * 2^-12 / sqrt(D). The error was measured by rounding in this way on a CPU, at scale 100,
D = 768, 256 images and 4,096 texts: 8e-4 per logit (root mean square; 4e-3 at worst) and 7e-4 of vl's gradient; if
bits are cut off instead of rounded, 3e-3 (1e-2) and 1e-3. What a tower computes in bf16 is already off by 6e-3 (3e-2)
and 5e-3. pvl's gradient at T = 3, where an image's own embedding leaves 1e-5 to others, is off by 3e-3 in float32 as in
TF32, and by 8e-3 with bits cut off. Nothing waits for the GPU.

Shapes: B images of this process, G of all processes, Q images of a queue, T texts, D embedding width; R rows, K keys
that they are compared with, C keys of a chunk; 2 is teacher and student. Teacher tensors and queues carry no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dimefm.system.matrix_products import similarities, tf32
from dimefm.training.distributed import ALONE, Place, gather_batch, logsumexp_over_all

Scale = float | torch.Tensor
Queue = tuple[torch.Tensor, torch.Tensor]
_Both = tuple[torch.Tensor, torch.Tensor]  # the teacher's and the student's

CHUNK_LOGITS, CUDA_CHUNK_LOGITS, KEPT_LOGITS = 2**23, 2**26, 2**26
"""The logits (rows x keys) that vl, pvl and udist work on at once: a handful of matrices of 32 MiB in float32, on a GPU
of 256 MiB. And the most that they keep, of teacher and student each, from the first pass over the keys to the second,
which else computes them again."""


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

    `mask_diagonal` leaves out each image's own embedding, which otherwise has nearly all of the target's mass; a
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
    """Regression of what tells images apart: the mean of 1 - cos(si - m, ti - m), m the teacher's mean embedding.

    CLIP's image embeddings share a large common direction (a mean cosine of about 0.5); 1 - cos is small once a student
    has learned that direction alone.
    """
    return 1 - F.cosine_similarity(student_image_BD - mean_D, teacher_image_BD - mean_D, dim=1).mean()


def contrastive_loss(
    student_BD: torch.Tensor, text_GD: torch.Tensor, text_row_G: torch.Tensor, *, scale: Scale, place: Place = ALONE
) -> torch.Tensor:
    """The task loss of CLIP (Radford et al. 2021) between each image and its own sentence: the mean of both
    directions' cross-entropies over the batch.

    `text_row_G` tells sentences apart: one that several images share is not a negative of any of them. -1 stands for
    an image without a sentence, which is left out. Every process computes the whole loss, on a handful of G x G
    matrices.
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
    """The mean over rows of the KL of the student's softmax over keys from the teacher's; `teacher` and `student` are
    the rows and keys of each.

    `by_key` adds the mean over keys of the KL of softmaxes over the rows of all processes; the student's `queued_QD`
    are rows of these softmaxes alone. `without_own` leaves out a row's own image, which is one of the keys.
    """
    factor = (scale if student_scale is None else student_scale) / temperature
    with tf32(student[0].device):
        value: torch.Tensor = _SoftmaxKL.apply(
            *student, factor, queued_QD, *teacher, scale / temperature, by_key, without_own, place
        )
    return value


class _SoftmaxKL(torch.autograd.Function):
    """_softmax_kl, with its gradient computed beside its value.

    The gradient of each softmax is written out, (q - p) / rows, and keys are taken in chunks: memory is bounded, and
    no logits are kept for a backward pass. A softmax may reach over several chunks, or over several processes; then a
    first pass over the chunks finds its sum, and a second one its value and gradient.
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
        student_RD = student_BD if queued_QD is None else torch.cat([student_BD, queued_QD])
        scaled_RD, zero = factor * student_RD, teacher_RD.new_zeros(())
        width = max(1, (CUDA_CHUNK_LOGITS if student_BD.is_cuda else CHUNK_LOGITS) // rows)
        chunks = [slice(at, min(at + width, keys)) for at in range(0, keys, width)]

        def logits(chunk: slice) -> _Both:
            teacher_RC = torch.addmm(zero, teacher_RD, teacher_KD[chunk].T, beta=0, alpha=teacher_factor)
            student_RC = scaled_RD @ student_KD[chunk].T
            if without_own:
                _leave_out_own(teacher_RC, chunk.start, place)
                _leave_out_own(student_RC, chunk.start, place)
            return teacher_RC, student_RC

        over_chunks, over_processes = len(chunks) > 1, by_key and place.world > 1
        pass_one: Iterable[_Both] = map(logits, chunks)  # computed as they are asked for
        pass_two: Iterable[_Both] = map(logits, chunks)
        if (over_chunks or over_processes) and rows * keys <= KEPT_LOGITS:
            pass_one = pass_two = list(pass_one)  # or computed once, and kept for both passes
        log_sum_2B = log_sum_2K = None
        if over_chunks or over_processes:
            log_sum_2B, log_sum_2K = _whole_log_sums(pass_one, images, over_chunks, over_processes, place)

        # All gradients have the factor `weight`: it is applied once, to their sums
        value, weight = torch.zeros_like(zero), place.world / keys if by_key else 1 / images
        grad_RD = torch.zeros_like(student_RD if ctx.needs_input_grad[2] else student_BD)
        grad_KD = torch.empty_like(student_KD) if ctx.needs_input_grad[1] else None
        for chunk, both in zip(chunks, pass_two, strict=True):
            part, grad_RC = _kl_and_gradient(_of_images(both, images), 1, log_sum_2B)
            value += part / images
            if by_key:
                grad_BC = grad_RC
                part, grad_RC = _kl_and_gradient(both, 0, None if log_sum_2K is None else log_sum_2K[:, chunk])
                value += part * weight
                grad_RC[:images].add_(grad_BC, alpha=1 / (images * weight))
            grad_RD.addmm_(grad_RC[: len(grad_RD)], student_KD[chunk])
            if grad_KD is not None:
                grad_KD[chunk] = (grad_RC.T @ scaled_RD) * weight
        grad_factor = (grad_RD * student_RD).sum() * weight if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(grad_RD[:images] * (factor * weight), grad_KD, grad_factor)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [None if found is None else grad * found for found in ctx.saved_tensors]
        return (*grads, *[None] * 7)  # the inputs after the first three get none


def _whole_log_sums(
    logits: Iterable[_Both], images: int, over_chunks: bool, over_processes: bool, place: Place
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Pass one: the logsumexp of each image over all keys (2, B), wanted where these are in several chunks, and of each
    key over the rows of all processes (2, K), wanted where these are several."""
    by_row: list[torch.Tensor] = []
    by_key: list[torch.Tensor] = []
    for both in logits:
        if over_chunks:
            by_row.append(_log_sums(_of_images(both, images), 1))
        if over_processes:
            by_key.append(_log_sums(both, 0))
    return (
        torch.stack(by_row).logsumexp(dim=0) if over_chunks else None,
        logsumexp_over_all(torch.cat(by_key, dim=1), place) if over_processes else None,
    )


def _of_images(both: _Both, images: int) -> _Both:
    """The rows of this process's images, without those of a queue."""
    return both[0][:images], both[1][:images]


def _leave_out_own(logits_BC: torch.Tensor, start: int, place: Place) -> None:
    """Take away, in place, all mass from each row's own key: row b is image rank + b * world, and key of that number.
    The chunk begins at key `start`."""
    first = max(0, math.ceil((start - place.rank) / place.world))
    own = logits_BC[first:, place.rank + first * place.world - start :: place.world].diagonal()
    own.fill_(torch.finfo(own.dtype).min / 4)  # not -inf: 0 * (inf - inf) is not 0


def _log_sums(both: _Both, dim: int) -> torch.Tensor:
    """logsumexp of the teacher's and the student's logits, float64 (2, R) or (2, C)."""
    found = []
    for logits_RC in both:
        largest = logits_RC.amax(dim, keepdim=True)
        found.append(largest.squeeze(dim) + (logits_RC - largest).exp_().sum(dim).double().log())
    return torch.stack(found)


def _log_softmax(logits_RC: torch.Tensor, dim: int, log_sum: torch.Tensor | None) -> torch.Tensor:
    """log_softmax along `dim`. Where these logits are a part of all, `log_sum` is the float64 logsumexp of all.

    Float64, since what a probability near 1 lacks to 1 (1e-5 for an image's own embedding in pvl) would be lost in the
    rounding of a float32.
    """
    if log_sum is None:
        return logits_RC.log_softmax(dim)
    rounded = log_sum.to(logits_RC.dtype)
    rest = (log_sum - rounded).to(logits_RC.dtype)
    return (logits_RC - rounded.unsqueeze(dim)).sub_(rest.unsqueeze(dim))


def _kl_and_gradient(both: _Both, dim: int, log_sum: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the KLs of the student's softmaxes from the teacher's, and its gradient by the student's logits."""
    of_teacher, of_student = (None, None) if log_sum is None else log_sum
    log_p, log_q = _log_softmax(both[0], dim, of_teacher), _log_softmax(both[1], dim, of_student)
    p = log_p.exp()
    value = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
    return value, log_q.exp_().sub_(p)
