"""How much of a training step is the step: the whole loop against a bare one, the texts of a step, and the targets."""

import dataclasses
import tempfile

import click
import open_clip
import torch

from benchmarks.measure import machine, median, ratio, rounds, table
from benchmarks.training_steps import BareStep, by_texts, loop_lines, target_seconds, with_teacher
from dimefm.models.towers import student_spec
from dimefm.store.embedding_store import Store
from dimefm.system.machine import choose_device, choose_precision
from dimefm.system.matrix_products import DTYPES
from dimefm.training.config import TrainConfig
from dimefm.training.recipes import paper


@click.command()
@click.option("--images", required=True, help="Image store.")
@click.option("--texts", required=True, help="Text store.")
@click.option("--student", default="ViT-B-32", show_default=True)
@click.option("--image-size", type=int)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Of a round; the first third is not counted.")
@click.option("--count", default=5, show_default=True, help="Rounds.")
@click.option("--workers", default=1, show_default=True)
@click.option("--precision", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True)
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
        bare = BareStep(spec, batch_size, precision, chosen)
        loop = _take_turns(config, bare, count)
        step, head = batch_size / median(loop.rates), f"{student} at {spec.image_size} px"
        heads = (head, "bare step, images/s", "whole loop", "share", "lowest-highest", "waiting for data")
        click.echo(table(heads, [(precision, *loop.cells())]))
        spent = target_seconds(Store(images), Store(texts), batch_size, batch_size, chosen)
        click.echo(f"targets: {1e3 * spent:.2f} ms to read those of a step, {spent / step:.2%} of it")
        if totals:
            steps_by_texts = by_texts(bare, spec, (batch_size, *totals), precision, chosen)
            seconds = rounds({f"{total:,}": call for total, call in steps_by_texts.items()}, count)
            base = seconds[f"{batch_size:,}"]
            lines_of = [(t, f"{median(s):.3f}", f"{ratio(s, base) - 1:+.1%}") for t, s in seconds.items()]
            click.echo(table(("texts of a step", "seconds", "against T = B"), lines_of))
        if online:
            tower = open_clip.create_model(online).visual
            size = open_clip.get_model_config(online)["vision_cfg"]["image_size"]
            ways = {"cached": bare, "online": with_teacher(bare, tower, size, precision, chosen)}
            seconds = rounds(ways, count, chosen)
            each = {way: batch_size / median(found) for way, found in seconds.items()}
            times = f"{ratio(seconds['online'], seconds['cached']):.1f}x"
            click.echo(f"with {online} online {each['online']:.2f} images/s, cached {each['cached']:.2f}: {times}")
    where = torch.cuda.get_device_name() if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    counted = f"medians of {count} paired rounds of {steps - steps // 3} steps"
    click.echo(f"{machine()}, {where}; batches of {batch_size}, {counted}")


@dataclasses.dataclass
class _Loop:
    """By round, images/s of the whole loop and of the bare step, and the loop's share of waiting for data."""

    rates: list[float] = dataclasses.field(default_factory=list)
    bare: list[float] = dataclasses.field(default_factory=list)
    waits: list[float] = dataclasses.field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        shares = [rate / bare for rate, bare in zip(self.rates, self.bare, strict=True)]
        return (
            f"{median(self.bare):,.1f}", f"{median(self.rates):,.1f}", f"{median(shares):.3f}",
            f"{min(shares):.3f}-{max(shares):.3f}", f"{median(self.waits):.1%}",
        )  # fmt: skip


def _take_turns(config: TrainConfig, bare: BareStep, count: int) -> _Loop:
    """Rounds of the bare step, the whole loop, and the bare step again, so that a machine that drifts drifts for both;
    the first is not counted."""
    assert config.max_steps
    loop, device, skipped = _Loop(), torch.device(config.device or "cpu"), config.max_steps // 3
    half = max(1, (config.max_steps - skipped) // 2)
    for turn in range(count + 1):
        before = rounds({"step": bare}, half, device)["step"]
        lines = loop_lines(dataclasses.replace(config, out=f"{config.out}/{turn}"))[skipped:]
        after = rounds({"step": bare}, half, device)["step"]
        if turn:
            loop.bare.append(config.batch_size / median(before + after))
            loop.rates.append(median([line["images_per_second"] for line in lines]))
            loop.waits.append(median([line["data_wait"] for line in lines]))
    return loop
