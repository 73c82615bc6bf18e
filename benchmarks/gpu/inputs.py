"""Inputs that the kit makes: photographs, sentences, teachers of random weights, finished stores.

What is written lies in one folder for all steps; the first that wants it makes it.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import interpolate

from benchmarks.gpu.sizes import Sizes
from benchmarks.stage1 import gather, trivial_teacher, write_tar
from cache_schemas.identity import Precision
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.models.clip import Clip, load_clip, wrap
from dimefm.sample import sample_dir
from dimefm.store.embedding_store import Store
from dimefm.system.machine import cpus

TINY, KEPT = 16, 256  # sides of kept JPEGs: one that costs next to nothing to decode, one for use
_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90  # of an ImageNet photograph
_SPREAD = 2.0
_SHARD = 1024


class Inputs:
    """Made on demand in `folder`, in the sizes given."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self._sizes = folder, sizes

    def tar(self) -> Path:
        """A tar of JPEGs of 500 x 375, the distinct ones over and over."""

        def make(path: Path) -> None:
            pictures = [photograph(seed) for seed in range(self._sizes.pictures)]
            members = {f"{i:06d}.jpg": pictures[i % len(pictures)] for i in range(self._sizes.images)}
            write_tar(path, members)

        return self._made("images/photographs.tar", make)

    def sentences(self) -> list[str]:
        """Sentences of the shipped sample, in its order, no two the same."""
        found: dict[str, None] = {}
        for path in sorted((sample_dir() / "texts").glob("*.gz")):
            found.update(dict.fromkeys(gzip.decompress(path.read_bytes()).decode().splitlines()))
        return list(found)[: self._sizes.sentences]

    def teacher(self, precision: Precision, device: torch.device) -> Clip:
        """The large teacher with random weights, made on the device where that is quick."""
        if self._sizes.teacher is None:
            return load_clip(self.tiny_teacher(), precision=precision, device=device.type)
        with torch.device(device):
            model = open_clip.create_model(self._sizes.teacher, device=device)
        return named(spread(model), self._sizes.teacher, precision, device)

    def tiny_teacher(self) -> str:
        """What --teacher takes for a model that costs next to nothing, as wide as the sizes say."""

        def make(path: Path) -> None:
            trivial_teacher(path, self._sizes.width)

        return f"local-dir:{self._made('tiny-teacher', make)}"

    def trained_teacher(self) -> str:
        """What --teacher takes for the shipped sample's; small, for the tiny one."""
        return f"local-dir:{sample_dir() / 'teacher'}" if self._sizes.teacher else self.tiny_teacher()

    def sample_images(self, count: int) -> list[bytes]:
        """JPEGs of the shipped sample."""
        return list(gather(sorted((sample_dir() / "images").iterdir()), count).values())

    def stores(self, pixels: int) -> tuple[str, str]:
        """Finished stores of the photographs, kept with a short side of `pixels`, and of sentences; by the tiny
        teacher on the CPU."""
        images, texts = self.folder / f"images-{pixels}.zarr", self.folder / "texts.zarr"
        done = self.folder / f"stores-{pixels}.done"
        if not done.exists():
            clip = load_clip(self.tiny_teacher(), precision="fp32", device="cpu")
            tar, sentences = (str(self.tar()),), (str(self.text_file()),)
            encode(PlanRequest(kind="image", arguments=tar, pixels=pixels, shard_rows=_SHARD), images, clip)
            encode(PlanRequest(kind="text", arguments=sentences, shard_rows=_SHARD), texts, clip)
            done.touch()
        return str(images), str(texts)

    def scratch(self, name: str) -> Path:
        """An empty folder, or the place for one, of that name."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def text_file(self) -> Path:
        """Those sentences, one a line."""
        return self._made("sentences.txt", lambda path: path.write_text("\n".join(self.sentences()), encoding="utf-8"))

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The file or folder of that name; a step that was stopped while it made it leaves none."""
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            half = path.with_name(f"half-{os.getpid()}-{path.name}")
            make(half)
            half.replace(path)
        return path


def encode(request: PlanRequest, out: Path, clip: Clip) -> Store:
    """The finished store of a request, encoded in this process; what is there of it is not made again."""
    store = open_or_plan(request, str(out), clip.identity)
    for shard in sorted(set(range(store.schema.shards)) - store.committed()):
        encode_shard(store, shard, clip, threads=cpus())
    return store


def named(model: torch.nn.Module, name: str, precision: Precision, device: torch.device) -> Clip:
    """A Clip around a model of open_clip's."""
    return wrap(model, name, None, open_clip.get_model_config(name), precision=precision, device=str(device))


@torch.no_grad()
def spread(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its matrices enlarged, so that embeddings of different inputs are as far apart as a trained
    model's: open_clip's first weights give images a cosine of 0.93 to each other, these one of about 0.5."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(_SPREAD)
    return model


def photograph(seed: int) -> bytes:
    """A JPEG with what makes photographs of its size take 40 to 70 kB: smooth light, texture at every scale, edges."""
    draw = torch.Generator().manual_seed(seed)
    light = torch.zeros(1, 3, _HEIGHT, _WIDTH)
    for octave in range(8):
        cells = (3 * 2**octave * 3 // 4 + 1, 3 * 2**octave + 1)
        field = torch.randn(1, 3, *cells, generator=draw) * 0.5 + torch.randn(1, 1, *cells, generator=draw)
        light += interpolate(field, (_HEIGHT, _WIDTH), mode="bicubic", align_corners=True) * 40 / 1.4**octave
    pixels = (light[0] + 120).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    pen, rng = ImageDraw.Draw(image, "RGBA"), np.random.default_rng(seed)
    for _ in range(12):
        left, top = rng.integers(_WIDTH - 40), rng.integers(_HEIGHT - 40)
        box = [int(left), int(top), int(left + rng.integers(20, 160)), int(top + rng.integers(20, 160))]
        colour = (*rng.integers(256, size=3).tolist(), int(rng.integers(60, 200)))
        (pen.rectangle if rng.random() < 0.5 else pen.ellipse)(box, fill=colour)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=_QUALITY)
    return sink.getvalue()
