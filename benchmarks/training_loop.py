"""How much of a training step is the step: the whole loop against a bare one, the texts of a step, and the targets."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import open_clip
import torch

from benchmarks.measure import machine, median, ratio, rounds, table
from dimefm.distributed import Place
from dimefm.learner import Learner
from dimefm.machine import choose_device, choose_precision
from dimefm.objective import LossConfig, Objective
from dimefm.optim import adamw
from dimefm.order import Order
from dimefm.recipes import paper
from dimefm.runlog import read_metrics
from dimefm.store import Store
from dimefm.student import build_student, has_convolutions, student_spec
from dimefm.textbank import TextBank, TextMix
from dimefm.train import train

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@click.command()
@click.option("--images", required=True, help="Image store.")
@click.option("--texts", required=True, help="Text store.")
@click.option("--student", default="ViT-B-32", show_default=True)
@click.option("--image-size", type=int)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Of a round; the first third is not counted.")
@click.option("--count", default=5, show_default=True, help="Rounds.")
@click.option("--workers", default=1, show_default=True)
@click.option("--precision", type=click.Choice(["auto", *_DTYPES]), default="auto", show_default=True)
@click.option("--texts-per-step", "totals", multiple=True, type=int, help="Also time a step with so many texts.")
@click.option("--online", metavar="NAME", help="Also time a step with this open_clip model run beside it.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
def training_loop(
    images: str, texts: str, student: str, image_size: int | None, batch_size: int, steps: int, count: int,
    workers: int, precision: str, totals: tuple[int, ...], online: str | None, device: str | None,
) -> None:  # fmt: skip
    """The whole loop against a bare forward, backward and optimiser step on resident random tensors."""
    chosen = torch.device(choose_device(device))
    precision = choose_precision(chosen.type) if precision == "auto" else precision
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            paper(images, texts, folder), student=student, image_size=image_size, batch_size=batch_size,
            texts_per_step=batch_size, epochs=1000, max_steps=steps, precision=precision, workers=workers,
            log_every=1, checkpoint_every=10**6, device=chosen.type,
        )  # fmt: skip
        spec = student_spec(student, Store(images).schema.teacher, image_size)
        bare = _Bare(spec, batch_size, precision, chosen)
        rates: dict[str, list[float]] = {"bare step": [], "whole loop": []}
        waits: list[float] = []
        for turn in range(count + 1):
            found = [bare.step() for _ in range(steps)][steps // 3 :]
            lines = _whole_loop(dataclasses.replace(config, out=f"{folder}/{turn}"))[steps // 3 :]
            if turn:
                rates["bare step"].append(batch_size / median(found))
                rates["whole loop"].append(median([line["images_per_second"] for line in lines]))
                waits.append(median([line["data_wait"] for line in lines]))
        rows = [(name, f"{median(values):,.1f}") for name, values in rates.items()]
        click.echo(table((f"{student} at {spec.image_size} px, {precision}", "images/s"), rows))
        share = ratio(rates["whole loop"], rates["bare step"])
        click.echo(f"whole loop: {share:.3f} of the bare step; waiting for data {median(waits):.1%} of it")
        step = batch_size / median(rates["whole loop"])
        click.echo(_targets(Store(images), Store(texts), batch_size, step, chosen))
        if totals:
            click.echo(_texts(bare.module, spec, batch_size, totals, precision, chosen, count))
        if online:
            click.echo(_online(online, bare, batch_size, precision, chosen, count))
    where = torch.cuda.get_device_name() if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    counted = f"medians of {count} paired rounds of {steps - steps // 3} steps"
    click.echo(f"{machine()}, {where}; batches of {batch_size}, {counted}")


class _Bare:
    """Forward, backward and optimiser of a student on images that are there already, with nothing around them."""

    def __init__(self, spec: Any, batch_size: int, precision: str, device: torch.device) -> None:
        self.module = build_student(spec)
        layout = torch.channels_last if has_convolutions(self.module) else torch.contiguous_format
        self.module.to(device, memory_format=layout)
        self._optimizer = adamw([self.module], lr=1e-5, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
        size = (batch_size, 3, spec.image_size, spec.image_size)
        self._images = torch.randn(size, device=device).to(memory_format=layout)
        self._target = torch.nn.functional.normalize(torch.randn(batch_size, spec.embed_dim, device=device), dim=-1)
        self._device, self._dtype = device, _DTYPES[precision]

    def step(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            features = self.module(self._images)
        loss = 1 - (torch.nn.functional.normalize(features.float(), dim=-1) * self._target).sum(dim=1).mean()
        loss.backward()
        self._optimizer.step()
        loss.item()
        return time.perf_counter() - began


def _online(name: str, bare: _Bare, batch_size: int, precision: str, device: torch.device, count: int) -> str:
    """What the cache saves: a step with the teacher's image tower (untrained: its time is the same) and without."""
    teacher = open_clip.create_model(name, device=device).visual.eval().requires_grad_(False)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    images = torch.randn(batch_size, 3, size, size, device=device)

    def with_teacher() -> None:
        with torch.inference_mode(), torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32"):
            teacher(images)
        bare.step()

    seconds = rounds({"cached": bare.step, "online": with_teacher}, count)
    rates = {way: batch_size / median(found) for way, found in seconds.items()}
    times = ratio(seconds["online"], seconds["cached"])
    return f"with {name} online {rates['online']:.2f} images/s, from the cache {rates['cached']:.2f}: {times:.1f}x"


def _whole_loop(config: Any) -> list[dict[str, Any]]:
    train(config)
    lines = [line for line in read_metrics(config.out) if line["event"] == "train"]
    for path in Path(config.out).glob("checkpoints/*.pt"):
        path.unlink()
    return lines


def _targets(images: Store, texts: Store, batch_size: int, step: float, device: torch.device) -> str:
    """The time that a step's cached targets take where they are read, as a share of the step."""
    order = Order(store=images, seed=0, batch_size=batch_size)
    bank = TextBank(texts, TextMix(), None, seed=0, total=batch_size, device=device)
    spent = []
    for number, _, rows in order.steps(0, 200):
        began = time.perf_counter()
        images.gather(rows)
        bank.draw(number, rows)
        spent.append(time.perf_counter() - began)
    seconds = statistics.mean(spent[50:])
    return f"targets: {1e3 * seconds:.2f} ms to read those of a step, {seconds / step:.2%} of it"


def _texts(
    module: Any, spec: Any, batch_size: int, totals: tuple[int, ...], precision: str, device: torch.device, count: int
) -> str:
    """Seconds of a whole step, without loading, by the number of texts."""

    def unit(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, spec.embed_dim), dim=-1).to(device)

    objective = Objective(LossConfig(vl=0.7, pvl=0.3), teacher_scale=100.0, dim=spec.embed_dim, mean_D=None)
    learner = Learner(module, objective, Place(0, 1, device), prepare=lambda images: images, precision=precision)
    optimizer = adamw([module], lr=1e-5, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    images, teacher = torch.randn(batch_size, 3, spec.image_size, spec.image_size, device=device), unit(batch_size)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step(text_TD: torch.Tensor) -> Callable[[], object]:
        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            values = learner.learn(images, teacher, text_TD, None, seed=(0, 0), scaler=scaler)
            optimizer.step()
            np.asarray(values["loss"].cpu())

        return run

    seconds = rounds({str(total): step(unit(total)) for total in (batch_size, *totals)}, count)
    base = seconds[str(batch_size)]
    rows = [(f"{int(t):,}", f"{median(s):.3f}", f"{ratio(s, base) - 1:+.1%}") for t, s in seconds.items()]
    return table(("texts of a step", "seconds", "against T = B"), rows)
