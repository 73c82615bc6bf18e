"""Planning, resuming and info at the paper's size: real tars and text files, planned by the real code, without pixels.

The tars are one archive of 10,000 members under many names (hard links), so that headers are walked as in a real set
while the disk holds 10 MB. Every step is a process of its own, whose peak memory is its own.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import click

from benchmarks.measure import machine, table
from cache_schemas import Preprocessing, TeacherIdentity

_MEMBERS = 10_000
TEACHER = TeacherIdentity(
    name="none",
    pretrained=None,
    weights="none",
    activation="gelu",
    preprocessing=Preprocessing(
        size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="shortest"
    ),
    tokenizer="none",
    context_length=77,
    embed_dim=768,
    precision="bf16",
    logit_scale=100.0,
    logit_bias=None,
)


@click.command()
@click.option("--rows", multiple=True, type=int, default=(1_000_000, 10_000_000, 40_000_000), show_default=True)
@click.option("--texts", multiple=True, type=int, default=(1_000_000, 28_400_000), show_default=True)
@click.option("--folder", help="Where to work; needs about 12 GB for the largest. Default: a temporary folder.")
@click.option("--step", hidden=True, help="Run one step in this process.")
@click.option("--kind", hidden=True)
@click.option("--shuffle", is_flag=True, hidden=True)
def plan_scale(
    rows: tuple[int, ...], texts: tuple[int, ...], folder: str | None, step: str | None, kind: str, shuffle: bool
) -> None:
    """Seconds and peak memory of planning, resuming and info over up to 40M images and 28.4M sentences."""
    if step:
        assert folder
        _step(step, kind, Path(folder), shuffle)
        return
    lines = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for count in rows:
            lines += _measure(Path(name) / f"image-{count}", "image", count, shuffle=False)
        for count in texts:
            for shuffled in (False, True):
                lines += _measure(Path(name) / f"text-{count}-{shuffled}", "text", count, shuffle=shuffled)
    click.echo(table(("rows", "step", "seconds", "peak memory"), lines))
    click.echo(machine())


def _measure(folder: Path, kind: str, count: int, *, shuffle: bool) -> list[tuple[str, ...]]:
    """The three steps over a source that is made first and deleted after."""
    folder.mkdir(parents=True)
    (_make_tars if kind == "image" else _make_texts)(folder / "source", count)
    lines: list[tuple[str, ...]] = []
    for step in ("plan", "resume", "info"):
        words = [sys.executable, "-m", "benchmarks", "plan-scale", "--folder", str(folder), "--step", step]
        words += ["--kind", kind, *(["--shuffle"] if shuffle else [])]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        seconds, peak = done.stdout.strip().split("\n")[-1].split()
        name = f"{count / 1e6:g}M {kind}s{', shuffled' if shuffle else ''}"
        lines.append((name, step, f"{float(seconds):,.1f}", f"{float(peak) / 1e9:.2f} GB"))
        click.echo(f"{lines[-1]}", err=True)
    shutil.rmtree(folder)
    return lines


def _step(step: str, kind: str, folder: Path, shuffle: bool) -> None:
    """One step, then its seconds and the peak memory of this process in bytes."""
    from dimefm.caching.plan import PlanRequest, open_or_plan
    from dimefm.caching.sentences import SentenceRules
    from dimefm.caching.worker import pending_shards
    from dimefm.inspection.info import describe

    rules = SentenceRules(min_words=3, shuffle=0 if shuffle else None)
    began = time.perf_counter()
    if step == "info":
        describe(str(folder / "out.zarr"))
    else:
        # The payloads are empty, so the size of a shard is given: what real images of 16 kB would get.
        source = (str(folder / "source"),)
        request = PlanRequest(kind=kind, arguments=source, sentences=rules, shard_rows=65536)  # type: ignore[arg-type]
        store = open_or_plan(request, str(folder / "out.zarr"), TEACHER)
        assert step == "plan" or len(pending_shards(store, retry=False)) == store.schema.shards
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]  # getrusage's peak is the parent's too
    print(seconds, int(status.split()[0]) * 1024)


def _make_tars(folder: Path, count: int) -> None:
    """Keys repeat from tar to tar, which a plan counts but does not mind; the payload is one byte."""
    folder.mkdir()
    first = folder / "000000.tar"
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(_MEMBERS):
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    for number in range(1, -(-count // _MEMBERS)):
        os.link(first, folder / f"{number:06d}.tar")


def _make_texts(folder: Path, count: int) -> None:
    folder.mkdir()
    for start in range(0, count, 1_000_000):
        stop = min(start + 1_000_000, count)
        lines = (
            f"a photo of thing number {n} beside the thing {n * 7 % 1000003} on a table" for n in range(start, stop)
        )
        (folder / f"{start:09d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
