"""cache-images against its floor, and against clip-retrieval's inference, over the same files with the same model.

Rates are of the steady state: each command is run over the images once and over them three times, and the difference
is what is reported, so that start-up, the same in both, falls out. Where the difference is no larger than its own
spread over the rounds, the machine was too busy, and "not measured" stands in its place.
"""

import io
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import open_clip
import safetensors.torch
import torch

from benchmarks.measure import excess, machine, table
from benchmarks.processes import Usage, run
from dimefm.images.decode import open_image
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.models.clip import load_clip
from dimefm.models.towers import has_convolutions
from dimefm.sample import sample_dir
from dimefm.system.machine import cpus

_TIMES = 3  # the long run is over the images this many times
TRIVIAL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "head_width": 32, "patch_size": 112},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@click.command()
@click.option("--images", help="Glob of the tars. Default: the sample's.")
@click.option("--limit", default=2000, show_default=True, help="Images to use.")
@click.option("--count", default=3, show_default=True, help="Rounds.")
@click.option("--teachers", default="sample,trivial", show_default=True)
@click.option("--clip-retrieval", metavar="PYTHON", help="The interpreter of an environment with clip-retrieval.")
def stage1(images: str | None, limit: int, count: int, teachers: str, clip_retrieval: str | None) -> None:
    """cache-images: CPU time an image against the bare teacher and decoder, and images/s against clip-retrieval."""
    tars = (
        sorted(Path(images).parent.glob(Path(images).name)) if images else sorted((sample_dir() / "images").iterdir())
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = gather(tars, limit)
        # Two tars a copy: the loader of clip-retrieval gives each of its processes tars of its own.
        halves = [dict(list(data.items())[half::2]) for half in range(2)]
        copies = [write_tar(folder / "images" / f"{i:05d}.tar", halves[i % 2]) for i in range(2 * _TIMES)]
        models = {"sample": sample_dir() / "teacher", "trivial": trivial_teacher(folder / "trivial")}
        rows = []
        for teacher in teachers.split(","):
            rows += _compare(teacher, models[teacher], data, copies, folder, count, clip_retrieval)
    head = ("teacher", "", "images/s", "CPU ms an image", "of the floor", "not in the workers")
    click.echo(table(head, rows))
    sizes = statistics.median(min(open_image(d).size) for d in data.values())
    click.echo(f"{machine()}; {len(data):,} JPEGs, median short side {sizes:.0f}; medians of {count} paired rounds")


def _compare(
    teacher: str, model: Path, data: dict[str, bytes], copies: list[Path], folder: Path, count: int, theirs: str | None
) -> list[tuple[str, ...]]:
    """The rows of one teacher."""
    bare: list[tuple[float, float]] = []
    runs: dict[str, list[tuple[Usage, Usage]]] = {"cache-images": [], "clip-retrieval": []}
    for _ in range(count):
        bare.append(_floor(model, list(data.values())))
        runs["cache-images"].append(_twice(lambda tars: _cache(model, tars, folder / "out.zarr"), copies))
        if theirs:
            runs["clip-retrieval"].append(_twice(lambda tars: _theirs(theirs, model, tars, folder / "out"), copies))
    forward, decode = (statistics.median(column) for column in zip(*bare, strict=True))
    rows = [(teacher, "floor: bare forward", "", f"{forward * 1e3:.2f}", "", "")]
    rows.append((teacher, "floor: bare decode and resize", "", f"{decode * 1e3:.2f}", "", ""))
    found = {name: steady(pairs, (_TIMES - 1) * len(data)) for name, pairs in runs.items() if pairs}
    for name, (wall, cpu, rest) in found.items():
        speed = show(wall, lambda seconds: f"{1 / seconds:,.0f}")
        times = show(cpu, lambda seconds: f"{seconds * 1e3:.2f}")
        ratio = show(cpu, lambda seconds: f"{seconds / (forward + decode):.2f}")
        share = show(rest, lambda seconds: f"{seconds * 1e3:.3f} ms") if name == "cache-images" else ""
        rows.append((teacher, name, speed, times, ratio, share))
    if theirs:
        (our_wall, our_cpu, _), (their_wall, their_cpu, _) = found["cache-images"], found["clip-retrieval"]
        speed = show(our_wall and their_wall and their_wall / our_wall, lambda times: f"{times:.2f}x")
        times = show(our_cpu and their_cpu and our_cpu / their_cpu, lambda times: f"{times:.2f}x")
        rows.append((teacher, "cache-images is", speed, times, "", ""))
    return rows


def _twice(measured: Callable[[list[Path]], Usage], copies: list[Path]) -> tuple[Usage, Usage]:
    """A command over the images once, and over all copies of them."""
    return measured(copies[:2]), measured(copies)


def steady(runs: list[tuple[Usage, Usage]], images: int) -> tuple[float | None, float | None, float | None]:
    """Seconds of wall clock and of CPU an image, and of CPU outside the workers, by the `images` that the second run of
    each round has more; None for what cannot be told from the machine's other work."""

    def an_image(of: Callable[[Usage], float]) -> float | None:
        found = excess([of(long) for _, long in runs], [of(short) for short, _ in runs])
        return None if found is None else found / images

    return an_image(lambda u: u.wall), an_image(lambda u: u.total_cpu), an_image(lambda u: u.cpu.get("rest", 0.0))


def show(value: float | None, words: Callable[[float], str]) -> str:
    """`words` of a value, or that there is none."""
    return words(value) if value else "not measured"


def _cache(model: Path, tars: list[Path], out: Path) -> Usage:
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "dimefm", "cache-images", *map(str, tars), "--out", str(out)]
    return run([*words, "--teacher", f"local-dir:{model}", "--device", "cpu", "--workers", str(cpus())])


_RUN_THEIRS = """
import sys
import open_clip
from clip_retrieval.clip_inference.worker import worker
config, weights, out, count, *tars = sys.argv[1:]
open_clip.add_model_config(config)
name = config.rpartition("/")[2].removesuffix(".json")
worker([0], tars, out, 1, input_format="webdataset", batch_size=256, num_prepro_workers=int(count), enable_text=False,
       enable_image=True, clip_model=f"open_clip:{name}/{weights}", use_jit=False)
"""


def _theirs(python: str, model: Path, tars: list[Path], out: Path) -> Usage:
    """clip-retrieval's own worker: WebDataset reader, DataLoader processes, encode_image, one .npy."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "benchmark-model.json"
        config.write_text(json.dumps(json.loads((model / "open_clip_config.json").read_text())["model_cfg"]))
        weights = model / "open_clip_model.safetensors"
        words = [python, "-W", "ignore", "-c", _RUN_THEIRS, str(config), str(weights), str(out), str(os.cpu_count())]
        return run([*words, *map(str, tars)])


def _floor(model: Path, data: list[bytes]) -> tuple[float, float]:
    """CPU seconds an image of the bare forward on ready tensors, and of the bare decoder and resize, on one thread."""
    torch.set_num_threads(1)
    clip = load_clip(f"local-dir:{model}", device="cpu")
    facts = clip.identity.preprocessing
    preprocess = Preprocess(facts)
    began = time.process_time()
    pixels = [preprocess(d) for d in data[:512]]
    decode = (time.process_time() - began) / len(pixels)
    whole = torch.stack(pixels[: len(pixels) // 32 * 32]).split(32)
    layout = torch.channels_last if has_convolutions(clip.model.visual) else torch.contiguous_format
    batches = [normalise(b, facts.mean, facts.std).to(memory_format=layout) for b in whole]
    with torch.inference_mode():
        clip.model.encode_image(batches[0])
        began = time.process_time()
        for batch in batches:
            clip.model.encode_image(batch)
    return (time.process_time() - began) / (32 * len(batches)), decode


def gather(tars: list[Path], limit: int) -> dict[str, bytes]:
    """The first JPEGs, largest archives first, by name."""
    found: dict[str, bytes] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg") and len(found) < limit:
                    found[f"{len(found):06d}.jpg"] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def write_tar(path: Path, data: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in data.items():
            member = tarfile.TarInfo(f"{path.stem}-{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def trivial_teacher(folder: Path, width: int = TRIVIAL["embed_dim"]) -> Path:
    """A model that costs nothing beside the pipeline: one transformer layer over four patches, random weights; its
    embeddings are `width` wide."""
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=width,
        vision_cfg=open_clip.CLIPVisionCfg(**TRIVIAL["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**TRIVIAL["text_cfg"]),
    )
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": {**TRIVIAL, "embed_dim": width}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
