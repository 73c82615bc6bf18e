"""Training against a bare step on images that are on the device already, and against the teacher in the loop."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.encoding import Tower
from benchmarks.gpu.forked import forked
from benchmarks.gpu.inputs import KEPT, TINY
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.timing import seconds
from benchmarks.measure import median, ratio, rounds
from benchmarks.training_steps import BareStep, by_texts, loop_lines, target_seconds, with_teacher
from dimefm.models.towers import student_spec
from dimefm.store.embedding_store import Store
from dimefm.system.machine import choose_precision
from dimefm.training.machine_settings import choose_loaders
from dimefm.training.recipes import paper

_STEPS = 10  # of the bare step, timed as one


def training(kit: Kit) -> None:
    """The paper's recipe on one GPU's share of its batch: the whole loop, then what a step consists of. Runs come
    first, since they fork."""
    sizes, device = kit.sizes, kit.device
    stores = {side: forked(kit, partial(kit.inputs.stores, side)) for side in (TINY, KEPT)}
    loops = {side: forked(kit, partial(_loop, kit, *found)) for side, found in stores.items()}
    precision = choose_precision(device.type)
    images, texts = (Store(path) for path in stores[TINY])
    spec = student_spec(sizes.student, images.schema.teacher)
    bare = BareStep(spec, sizes.train_batch, precision, device)
    step = seconds([bare] * _STEPS, device, repeats=3)
    what, rate = f"{sizes.student}, {precision}, B = {sizes.train_batch}", sizes.train_batch / step
    used = 3 * Tower(kit, bare.module, (spec.image_size,) * 2).share(rate, precision)
    at = f"{what}: {used:.0%} of the peak, the backward pass counted as two forward ones"
    kit.line("bare step", rate, "images/s", at)
    workers, ahead = choose_loaders(None, device.type, sizes.train_batch * 3 * spec.image_size**2)
    at = f"{what}, T = B, {workers} loader processes, each {ahead} batches ahead"
    for side, name in ((TINY, "tiny"), (KEPT, f"decoded from kept JPEGs of {KEPT} px")):
        found, waited, late = loops[side]
        kit.line(f"whole loop, images {name}", found, "images/s", f"{at}; waiting for data {waited:.0%}")
        kit.bar(f"whole loop against the bare step, images {name}", found / rate, "", at, least=0.95)
    kit.rate("student_images_per_second", found)
    kit.remember("loop", found)
    kit.bar("loader processes forked after a context was on the GPU", late, "", at, most=0)
    _texts(kit, bare, spec, precision, what)
    spent = target_seconds(images, texts, sizes.train_batch, sizes.train_batch, device)
    kit.bar("reading a step's targets, of the step", spent / step, "", f"{what}: {1e3 * spent:.2f} ms", most=0.01)
    gradients = [p.grad for p in bare.module.parameters() if p.grad is not None]
    norm = seconds([lambda: torch.nn.utils.get_total_norm(gradients)], device)
    kit.line("norm of the gradient, of the step", norm / step, "", f"{what}: {1e3 * norm:.2f} ms")
    if kit.enough_to_compile():
        compiled = BareStep(spec, sizes.train_batch, precision, device, compile=True)
        times = step / seconds([compiled] * _STEPS, device, repeats=2)
        kit.line("bare step compiled", times * rate, "images/s", f"{what}: {times:.3f} of the eager one")


def _loop(kit: Kit, images: str, texts: str) -> tuple[float, float, float]:
    """Images/s of a training run and the share of the time waited for data, its first third left out; and
    how many of its processes were forked after something had begun on the GPU."""
    sizes, forks = kit.sizes, list[bool]()
    os.register_at_fork(before=lambda: forks.append(kit.device.type == "cuda" and has_context()))
    config = replace(
        paper(images, texts, str(kit.inputs.scratch("loop"))), student=sizes.student, batch_size=sizes.train_batch,
        texts_per_step=sizes.train_batch, epochs=1000, max_steps=sizes.train_steps, device=kit.device.type,
        log_every=max(1, sizes.train_steps // 6), checkpoint_every=10**6,
    )  # fmt: skip
    lines = loop_lines(config)
    counted = lines[len(lines) // 3 :]
    rate, waited = (median([line[name] for line in counted]) for name in ("images_per_second", "data_wait"))
    return rate, waited, float(sum(forks))


def has_context() -> bool:
    """Whether this process has a context on the GPU, which no fork must share. That the driver was asked for the
    card's name or size makes none."""
    flags, active = ctypes.c_uint(), ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
    return bool(active.value)


def _texts(kit: Kit, bare: BareStep, spec: Any, precision: str, what: str) -> None:
    """A step by its number of texts, against as many texts as images."""
    steps = by_texts(bare, spec, kit.sizes.totals, precision, kit.device)
    spent = rounds({str(total): step for total, step in steps.items()}, 7, kit.device)
    base = spent[str(kit.sizes.totals[0])]
    for total in kit.sizes.totals:
        more = ratio(spent[str(total)], base) - 1
        at = f"{what}: {1e3 * median(spent[str(total)]):.1f} ms"
        if total == 32768:
            kit.bar(f"cost of T = {total:,} against T = B", more, "of a step", at, most=0.05)
        else:
            kit.line(f"cost of T = {total:,} against T = B", more, "of a step", at)


def online(kit: Kit) -> None:
    """A bare step alone, as from the cache, and behind the teacher's image tower."""
    sizes, device, precision = kit.sizes, kit.device, choose_precision(kit.device.type)
    teacher = kit.inputs.teacher("fp32", device)
    spec = student_spec(sizes.student, teacher.identity)
    bare = BareStep(spec, sizes.train_batch, precision, device)
    size = teacher.identity.preprocessing.size[0]
    ways = {"cached": bare, "online": with_teacher(bare, teacher.model.visual, size, precision, device)}
    spent = rounds(ways, 5, device)
    at = f"{sizes.student}, {sizes.name}, {precision}, B = {sizes.train_batch}, bare steps"
    rates = {way: sizes.train_batch / median(found) for way, found in spent.items()}
    kit.rate("online_student_images_per_second", rates["online"])
    for way, rate in rates.items():
        kit.line(f"step, teacher {way}", rate, "images/s", at)
    kit.bar("cached against online", ratio(spent["online"], spent["cached"]), "times", at, least=5)
    if "loop" in kit.known:
        at = "the loop decodes and augments; the step online does not"
        kit.line(
            "the whole loop from the cache against a step online", kit.known["loop"] / rates["online"], "times", at
        )
