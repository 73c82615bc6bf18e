"""What must repeat itself on the device: a shard to the last bit, the canary, a run that goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.forked import forked
from benchmarks.gpu.inputs import TINY, encode
from benchmarks.gpu.kit import Kit
from benchmarks.stage1 import write_tar
from cache_schemas.plan import planned_rows
from dimefm.caching.canary import check_canary
from dimefm.caching.encode_rows import encode_rows
from dimefm.caching.plan import PlanRequest
from dimefm.errors import MismatchError
from dimefm.models.clip import load_clip, teacher_precision
from dimefm.system.machine import cpus
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import paper
from dimefm.training.train import train

_STEPS = 8


def shard(kit: Kit) -> None:
    """Stage 1 with the sample's teacher: the same bytes again, with other numbers of threads; and its canary, which
    must let that teacher pass and stop another."""
    device = kit.device.type
    where = kit.inputs.trained_teacher()
    clip = load_clip(where, precision=teacher_precision(device), device=device)
    jpegs = kit.inputs.sample_images(min(4 * kit.sizes.batch, 1024))
    tar = write_tar(kit.inputs.folder / "sample/images.tar", {f"{i:06d}.jpg": jpeg for i, jpeg in enumerate(jpegs)})
    request = PlanRequest(kind="image", arguments=(str(tar),), shard_rows=512, batch_size=kit.sizes.batch // 2)
    store = encode(request, kit.inputs.scratch("sample.zarr"), clip)
    stored = store.shard_arrays(0)
    for threads in (1, cpus()):
        again = encode_rows(planned_rows(store.plan(0)), store.schema, clip, threads=threads)
        same = all(np.array_equal(values, stored[name]) for name, values in again.arrays.items())
        kit.require("a shard again gives the same bytes", same, f"{len(jpegs)} images, {threads} decoding threads")
    check_canary(store, clip)
    other = load_clip(where, precision=clip.identity.precision, device=device)
    with torch.no_grad():
        for parameter in other.model.visual.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    try:
        check_canary(store, other)
        stopped = False
    except MismatchError:
        stopped = True
    kit.require("the canary stops a teacher with other weights", stopped)


def small_run(kit: Kit, out: Path) -> TrainConfig:
    """Eight steps of a small ViT in float32 with the paper's losses, which do not depend on how many processes there
    are; checkpoints at every fourth."""
    images, texts = kit.inputs.stores(TINY)
    return replace(
        paper(images, texts, str(out)), student="test_vit", batch_size=16, texts_per_step=64, epochs=1000,
        max_steps=_STEPS, lr=1e-3, warmup_epochs=0, loss=LossConfig(), precision="fp32", workers=1, log_every=1,
        checkpoint_every=_STEPS // 2, device=kit.device.type,
    )  # fmt: skip


def logged(out: Path) -> np.ndarray:
    """The loss of each step of a run, float64."""
    return np.array([line["loss"] for line in read_metrics(str(out)) if line["event"] == "train"])


def resume(kit: Kit) -> None:
    """A run whose last checkpoint is lost goes on from the one before to the same weights: to the last bit on a CPU,
    and on a GPU if its sums come in the same order."""
    out, whole = kit.inputs.scratch("resumed"), kit.inputs.scratch("never-stopped")
    config = forked(kit, partial(small_run, kit, out))
    forked(kit, partial(train, config))
    shutil.copytree(out, whole)
    (out / "checkpoints" / f"step-{_STEPS:08d}.pt").unlink()
    forked(kit, partial(train, config))
    before, after, losses = _weights(whole), _weights(out), logged(whole)
    apart = max(float((after[name] - before[name]).abs().max()) for name in before)
    bits = "bit for bit the same" if apart == 0 else f"largest difference of a weight {apart:.1e}"
    error = float(np.abs(logged(out) / losses - 1).max())
    kit.check(
        "resumed run: relative difference of a loss", error, "", bits, most=0.0 if kit.device.type == "cpu" else 1e-3
    )
    kit.line("steps of it", float(len(losses)), "", f"losses {losses[0]:.4f} to {losses[-1]:.4f}")


def _weights(out: Path) -> dict[str, torch.Tensor]:
    state = Checkpoints(str(out)).load()
    assert state is not None
    return {name: value.double() for name, value in state["image"]["model"].items()}
