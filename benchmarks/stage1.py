"""cache-images against its floor, and against clip-retrieval's inference, over the same files with the same model.

Rates are of the steady state: each command is run over the images once and over them three times, and the difference
is what is reported, so that start-up, the same in both, falls out.
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
from pathlib import Path

import click
import open_clip
import safetensors.torch
import torch

from benchmarks.measure import machine, table
from benchmarks.processes import Usage, run
from dimefm.images.decode import open_image
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.models.clip import load_clip
from dimefm.models.towers import has_convolutions
from dimefm.sample import sample_dir

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
    extra = (_TIMES - 1) * len(data)
    found: dict[str, list[tuple[float, ...]]] = {"floor": [], "cache-images": [], "clip-retrieval": []}
    for _ in range(count):
        forward, decode = _floor(model, list(data.values()))
        found["floor"].append((forward, decode))
        short, long = (_cache(model, copies[: 2 * n], folder / "out.zarr") for n in (1, _TIMES))
        found["cache-images"].append(_marginal(short, long, extra, forward + decode))
        if theirs:
            short, long = (_theirs(theirs, model, copies[: 2 * n], folder / "out") for n in (1, _TIMES))
            found["clip-retrieval"].append(_marginal(short, long, extra, forward + decode))
    floor = [statistics.median(column) for column in zip(*found["floor"], strict=True)]
    rows = [(teacher, "floor: bare forward", "", f"{floor[0] * 1e3:.2f}", "", "")]
    rows.append((teacher, "floor: bare decode and resize", "", f"{floor[1] * 1e3:.2f}", "", ""))
    for name in ("cache-images", "clip-retrieval"):
        if found[name]:
            wall, cpu, ratio, rest = (statistics.median(column) for column in zip(*found[name], strict=True))
            share = f"{rest * 1e3:.3f} ms" if name == "cache-images" else ""
            rows.append((teacher, name, f"{1 / wall:,.0f}", f"{cpu * 1e3:.2f}", f"{ratio:.2f}", share))
    if found["clip-retrieval"]:
        pairs = zip(found["cache-images"], found["clip-retrieval"], strict=True)
        ratios = [(b[0] / a[0], b[1] / a[1]) for a, b in pairs]
        speed, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
        rows.append((teacher, "cache-images is", f"{speed:.2f}x", f"{1 / cpu:.2f}x", "", ""))
    return rows


def _marginal(short: Usage, long: Usage, images: int, floor: float) -> tuple[float, ...]:
    """Seconds of wall clock and of CPU an image, the latter by the floor, and CPU seconds outside the workers."""
    cpu = (long.total_cpu - short.total_cpu) / images
    rest = (long.cpu.get("rest", 0) - short.cpu.get("rest", 0)) / images
    return (long.wall - short.wall) / images, cpu, cpu / floor, rest


def _cache(model: Path, tars: list[Path], out: Path) -> Usage:
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "dimefm", "cache-images", *map(str, tars), "--out", str(out)]
    return run([*words, "--teacher", f"local-dir:{model}", "--device", "cpu"])


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
