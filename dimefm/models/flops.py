"""Floating-point operations of the two towers, counted as they run.

Shapes: B images or sentences, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dimefm.models.clip import Clip


def count_flops(clip: Clip) -> tuple[int, int]:
    """Of one image, and of one sentence that fills the context. A product and its sum count as two, as hardware is
    rated; papers often give multiply-adds, which are half as many. Matrix products, convolutions and attention are
    counted, as in torch's own counter; norms, activations and additions are not, which are about a percent."""
    height, width = clip.identity.preprocessing.size
    pixels_B3HW = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    tokens_BL = clip.tokenize([" ".join(["word"] * clip.identity.context_length)])
    clip.encode_tokens(tokens_BL)  # the first call also finds out whether padding can be left out
    return flops_of(lambda: clip.encode_images(pixels_B3HW)), flops_of(lambda: clip.encode_tokens(tokens_BL))


def flops_of(run: Callable[[], object]) -> int:
    """Of a call. Attention runs as plain products in it: the counter does not see into fused kernels of the CPU."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())
