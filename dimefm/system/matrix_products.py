"""Matrix products of embeddings. On a GPU they use TF32: inputs with 10 bits of mantissa, sums in float32.

A float16 is a TF32 number, so products of cached embeddings lose nothing, at seven times the rate of float32 on an
H100. A factor must be applied to the product, or to the side that is not cached: an embedding times 100 is no longer a
TF32 number.

Shapes: A and B rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The numbers that products are computed in, by the name of a precision."""


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Within the block, float32 products on a GPU use TF32, in all threads; on other devices nothing changes. Products
    of a backward pass do not, since it runs after the block."""
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.backends.cuda.matmul
    # Each torch warns or fails where the other name is used: the new one came with 2.9.
    name, wanted = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)
    before = getattr(settings, name)
    setattr(settings, name, wanted)
    try:
        yield
    finally:
        setattr(settings, name, before)


def similarities(one_AD: torch.Tensor, other_BD: torch.Tensor) -> torch.Tensor:
    """one @ other.T, (A, B); on a GPU its gradient uses TF32 products as well."""
    product_AB: torch.Tensor = _Similarities.apply(one_AD, other_BD)
    return product_AB


class _Similarities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one_AD: torch.Tensor, other_BD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(one_AD, other_BD)
        with tf32(one_AD.device):
            return one_AD @ other_BD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AB: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        one_AD, other_BD = ctx.saved_tensors
        with tf32(grad_AB.device):
            return (
                grad_AB @ other_BD if ctx.needs_input_grad[0] else None,
                grad_AB.T @ one_AD if ctx.needs_input_grad[1] else None,
            )
