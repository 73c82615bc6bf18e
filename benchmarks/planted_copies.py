"""Which planted copies of images are found: by `select-images --dedup`, by `leaks`, and at a million rows.

Copies are resized, compressed again, cropped, mirrored or brightened, of images of --images; they and the originals are
cached in one store. For `leaks` the copies are a test set, beside images that are not trained on.

Shapes: N rows of a shard, P planted rows, D embedding width.
"""

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from benchmarks.grown import grow
from benchmarks.measure import machine, table
from benchmarks.processes import run
from dimefm.sample import sample_dir
from dimefm.store.embedding_store import Store
from dimefm.store.selected_images import SelectedImages
from dimefm.system.machine import describe

_Picture = Image.Image
_FORMATS = ("JPEG", "PNG", "WEBP")
_COSINES, _FAR = (0.98, 0.95, 0.9, 0.85), 0.95
_SHARE = 0.01  # of a million rows that are planted


def _saved(image: _Picture, quality: int = 90) -> bytes:
    sink = io.BytesIO()
    image.convert("RGB").save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def _cut(image: _Picture, share: float) -> _Picture:
    width, height = image.size
    left, top = 0.6 * (1 - share) * width, 0.3 * (1 - share) * height
    return image.crop((int(left), int(top), int(left + share * width), int(top + share * height)))


KINDS: dict[str, Callable[[_Picture], bytes]] = {
    "compressed (quality 40)": lambda image: _saved(image, 40),
    "half the size": lambda image: _saved(image.resize((max(16, image.width // 2), max(16, image.height // 2)))),
    "mirrored": lambda image: _saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "brighter": lambda image: _saved(ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.4)).enhance(0.8)),
    "grey": lambda image: _saved(image.convert("L")),
    "cropped to 0.9": lambda image: _saved(_cut(image, 0.9)),
    "cropped to 0.75": lambda image: _saved(_cut(image, 0.75)),
    "cropped to 0.6": lambda image: _saved(_cut(image, 0.6)),
}


@click.command()
@click.option("--images", multiple=True, help="Tars of images. Default: the sample's.")
@click.option("--unseen", help="Tar of images that are not trained on, for leaks. Default: of the sample's sets.")
@click.option("--teacher", help="Default: the sample's.")
@click.option("--planted", default=250, show_default=True, help="Images that are copied, once in each way.")
@click.option("--rows", default=1_000_000, show_default=True, help="Rows of the grown store; 0: none.")
@click.option("--out", default="runs/planted-copies", show_default=True, help="What is there is not made again.")
def planted_copies(
    images: tuple[str, ...], unseen: str | None, teacher: str | None, planted: int, rows: int, out: str
) -> None:
    """Recall and precision of select-images --dedup and of leaks on planted copies."""
    shipped, base = sample_dir(), Path(out)
    sources = images or tuple(map(str, sorted((shipped / "images").glob("train-*.tar"))))
    teacher = teacher or f"local-dir:{shipped / 'teacher'}"
    originals = _drawn(sources, planted)
    store = base / "images.zarr"
    _write_tar(base / "copies.tar", _copies(originals))
    cached = ["cache-images", *sources, str(base / "copies.tar"), "--out", str(store), "--teacher", teacher]
    _dimefm(*cached, "--precision", "bf16")
    click.echo(_by_selection(base, Store(str(store)), list(originals)))
    trained = base / "trained.zarr"
    _dimefm("cache-images", *sources, "--out", str(trained), "--teacher", teacher, "--precision", "bf16")
    others = unseen or str(next((shipped / "eval" / "cifar10").rglob("*.tar")))
    _write_set(base / "test-set", originals, others)
    click.echo(f"\n{_by_leaks(base, trained, list(originals))}")
    if rows:
        click.echo(f"\n{_at_scale(base, str(store), rows)}")
    click.echo(f"\n{machine()}, {describe('cpu')}; {planted} images copied in {len(KINDS)} ways, seed 0")


def _drawn(sources: tuple[str, ...], count: int) -> dict[str, bytes]:
    """Images of the tars by key, drawn at random."""
    found: dict[str, bytes] = {}
    for source in sources:
        found |= dict(_members(source))
    keys = sorted(found)
    chosen = np.random.default_rng(0).choice(len(keys), min(count, len(keys)), replace=False)
    return {keys[place]: found[keys[place]] for place in sorted(chosen.tolist())}


def _members(path: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                file = tar.extractfile(member)
                assert file
                yield member.name.rpartition(".")[0], file.read()


def _copies(originals: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for number, data in enumerate(originals.values()):
        image = Image.open(io.BytesIO(data), formats=_FORMATS).convert("RGB")
        for way, make in enumerate(KINDS.values()):
            yield f"copy-{number:05d}-{way}.jpg", make(image)


def _write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _write_set(folder: Path, originals: dict[str, bytes], unseen: str) -> None:
    """A set of the copies, and of as many images that are not trained on."""
    if folder.exists():
        return
    copies = list(_copies(originals))
    others = [
        (f"other-{place:05d}.jpg", data) for place, (_, data) in zip(range(len(copies)), _members(unseen), strict=False)
    ]
    for name, members in (("copy", copies), ("other", others)):
        place = folder / "test" / name
        place.mkdir(parents=True)
        for file, data in members:
            (place / file).write_bytes(data)


def _by_selection(base: Path, store: Store, originals: list[str]) -> str:
    """For each threshold: the share of the copies of each kind that are left out, or stand for their original and all
    its copies; and the share of all other images that are left out too."""
    rows = {one["key"]: one["row"] for one in store.samples(np.arange(store.schema.rows))}
    lines = []
    for limit in _COSINES:
        kept = _kept(base, store, limit)
        groups = [
            {rows[key], *(rows[f"copy-{n:05d}-{way}"] for way in range(len(KINDS)))} for n, key in enumerate(originals)
        ]
        cells = []
        for way in range(len(KINDS)):
            copies = [rows[f"copy-{n:05d}-{way}"] for n in range(len(originals))]
            found = [copy not in kept or group & kept == {copy} for copy, group in zip(copies, groups, strict=True)]
            cells.append(f"{np.mean(found):.1%}")
        planted = {row for key, row in rows.items() if key.startswith("copy-")} | {rows[key] for key in originals}
        alone = [row for row in rows.values() if row not in planted]
        cells.append(f"{np.mean([row not in kept for row in alone]):.2%}")
        lines.append((f"{limit}", *cells))
    head = ("--dedup", *KINDS, "of all others left out")
    return table(head, lines)


def _kept(base: Path, store: Store, limit: float) -> set[int]:
    out = base / f"dedup-{limit}.selection"
    _dimefm("select-images", store.path, "--out", str(out), "--dedup", str(limit), "--device", "cpu")
    return set(SelectedImages(str(out)).rows().tolist())


def _by_leaks(base: Path, trained: Path, originals: list[str]) -> str:
    """The share of the copies of each kind that are found with their original, and of images that are not trained on
    that are taken for a leak."""
    out = base / "leaks.selection"
    _dimefm("leaks", str(trained), str(base / "test-set"), "--out", str(out), "--device", "cpu")
    pairs = pq.read_table(out / "leaks.parquet").to_pylist()
    found: dict[str, set[str]] = {}
    for one in pairs:
        if one["leak"]:
            found.setdefault(one["test_key"].rpartition("/")[2], set()).add(one["key"])
    shares = []
    for way in range(len(KINDS)):
        hits = [key in found.get(f"copy-{n:05d}-{way}", ()) for n, key in enumerate(originals)]
        shares.append(f"{np.mean(hits):.1%}")
    others = [path.stem for path in (base / "test-set" / "test" / "other").iterdir()]
    wrong = sum(name in found for name in others)
    return table(("", *KINDS, "unseen images taken for leaks"), [("leaks", *shares, f"{wrong} of {len(others):,}")])


def _at_scale(base: Path, real: str, rows: int) -> str:
    """Time, memory and recall over a grown store, of whose rows one in a hundred is near to another."""
    path, dim = base / f"grown-{rows}.zarr", Store(real).schema.dim

    def plant(shard: int, value_ND: np.ndarray[Any, Any]) -> None:
        """Make the last rows of a shard near to its first, with a cosine from 0.95 to 1."""
        count = int(len(value_ND) * _SHARE)
        rng = np.random.default_rng((7, shard))
        noise_PD = rng.standard_normal((count, value_ND.shape[1]), dtype=np.float32)
        first_PD = value_ND[:count]
        noise_PD -= (noise_PD * first_PD).sum(axis=1, keepdims=True) * first_PD
        noise_PD /= np.linalg.norm(noise_PD, axis=1, keepdims=True)
        cosine_P1 = rng.uniform(_FAR + 0.002, 1, (count, 1)).astype(np.float32)
        value_ND[-count:] = cosine_P1 * first_PD + np.sqrt(1 - cosine_P1**2) * noise_PD

    store = grow(real, path, "image", rows, dim, seed=0, change=plant)
    out = base / "grown.selection"
    shutil.rmtree(out, ignore_errors=True)
    words = ["select-images", store.path, "--out", str(out), "--by", "random", "--dedup", str(_FAR), "--device", "cpu"]
    usage = run([sys.executable, "-m", "dimefm", *words], memory=True)
    kept_T = np.zeros(rows, bool)
    kept_T[SelectedImages(str(out)).rows()] = True
    both = found = 0
    for start, stop in map(store.schema.shard_range, range(store.schema.shards)):
        count = int((stop - start) * _SHARE)
        found += int((~(kept_T[start : start + count] & kept_T[stop - count : stop])).sum())
        both += count
    cells = (f"{rows:,} x {dim}", f"{usage.wall:,.0f} s", f"{usage.total_cpu:,.0f} s", f"{rows / usage.wall:,.0f}/s")
    memory = (f"{max(usage.own) / 1e9:.2f} GB", f"{found / both:.2%} of {both:,}")
    return table(("rows", "wall", "CPU", "rate", "peak of own memory", "planted pairs found"), [(*cells, *memory)])


def _dimefm(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dimefm", *words, "--quiet"], check=True, stdout=subprocess.DEVNULL)
