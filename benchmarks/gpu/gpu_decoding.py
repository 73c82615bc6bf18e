"""JPEGs decoded on the GPU (`cache-images --decoder nvjpeg`) against the CPU's decoder: pixels, embeddings, speed."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch

from benchmarks.gpu.kit import Kit
from benchmarks.gpu.timing import seconds
from cache_schemas import EmbeddingStore
from dimefm.caching.gpu_image_loader import open_loader
from dimefm.errors import StoreError
from dimefm.models.clip import Clip
from dimefm.system.machine import cpus

_COMPARED, _READING = 256, 4  # images; threads that read


def nvjpeg(kit: Kit, clip: Clip, rows: list[dict[str, Any]], schema: EmbeddingStore) -> None:
    """How far from the CPU's its pixels and embeddings are, and images/s of it alone."""
    theirs = replace(schema, decoder="nvjpeg")
    try:
        loader = open_loader(theirs, clip.device)
    except StoreError as error:
        kit.line("nvJPEG", "not here", "", error.what)
        return
    some = list(islice(cycle(rows), _COMPARED))
    ((_, cpu_pixels),) = open_loader(schema, clip.device).batches(some, len(some), cpus())
    ((_, gpu_pixels),) = loader.batches(some, len(some), _READING)
    off = (gpu_pixels.cpu().int() - cpu_pixels.int()).abs().float()
    at = f"{len(some)} images; mean {off.mean():.2f}, at most {off.max():.0f}"
    kit.line("nvJPEG: pixels off by more than 8 of 255", float((off > 8).float().mean()), "", at)
    ours, known = (torch.cat([clip.encode_images(part) for part in pixels.split(schema.batch_size)])
                   for pixels in (gpu_pixels, cpu_pixels))  # fmt: skip
    cosine_B = (ours.double() * known.double()).sum(dim=1)
    kit.line("nvJPEG: least cosine to the CPU's decoder", float(cosine_B.min()), "", f"mean {cosine_B.mean():.5f}")
    many = list(islice(cycle(rows), 4 * schema.batch_size))

    def decode() -> None:
        for _ in loader.batches(many, schema.batch_size, _READING):
            pass

    rate = len(many) / seconds([decode], kit.device, repeats=1)
    kit.line("nvJPEG: decoded and resized", rate, "images/s", f"{_READING} threads read")
