"""A probe's whole search on cached features, against the encoder in every epoch; and its memory at ImageNet's size."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import torch

from benchmarks.measure import machine, median, table
from benchmarks.plan_scale import TEACHER
from cache_schemas import EmbeddingStore, SourceSummary, Status
from cache_schemas.embedding_store import EMBEDDING, STATUS
from cache_schemas.plan import IMAGE_PLAN
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.own_sets import open_folder
from dimefm.evaluation import probe as probing
from dimefm.evaluation.features import Features, compute_features
from dimefm.evaluation.open_model import open_model
from dimefm.evaluation.probe import probe
from dimefm.evaluation.text_embeddings import TextEmbeddings
from dimefm.images.preprocess import Preprocess
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import create_store
from dimefm.store.parquet_tables import write_plan
from dimefm.system.machine import cpus

_TEST_EVERY = 5  # image of a class goes to the test part
_SHARD_ROWS, _TEST_ROWS = 1024, 50_000


@click.command()
@click.option("--model", help="A run, a folder, or local-dir:FOLDER.")
@click.option("--set", "folder", help="A labelled set: four fifths of each class become the training images.")
@click.option("--count", default=3, show_default=True, help="Measured epochs of the encoder.")
@click.option("--scale", type=int, help="Instead: this many random features, and the memory of one epoch of each step.")
@click.option("--dim", default=768, show_default=True, help="Of those.")
@click.option("--classes", default=1000, show_default=True, help="Of those.")
@click.option("--heads", default=4, show_default=True, help="Of those: classifiers that are searched.")
def probe_search(
    model: str | None, folder: str | None, count: int, scale: int | None, dim: int, classes: int, heads: int
) -> None:
    """Seconds of ELEVATER's search and final fit on features that are encoded once, and with the encoder each epoch."""
    with tempfile.TemporaryDirectory() as temporary:
        if scale:
            _memory(Path(temporary), scale, dim, classes, heads)
        elif model and folder:
            with open_model(model) as clip:
                _search(clip, open_folder(folder), Path(temporary), count)
        else:
            raise click.UsageError("give --model and --set, or --scale")


def _search(clip: Clip, images: ImageSet, folder: Path, count: int) -> None:
    train, test = training_and_test_parts(images)
    heads_CD = TextEmbeddings(clip, str(folder)).of_classes(train.classnames, train.prompts())
    began = time.perf_counter()
    embedded = [compute_features(clip, part, str(folder / f"{part.split}.zarr")) for part in (train, test)]
    encoding = time.perf_counter() - began
    with _counted() as asked:
        began = time.perf_counter()
        rows_N = np.arange(len(train.samples))
        rule: dict[str, Any] = {"heads_CD": heads_CD, "selection": "elevater"}
        probe(embedded[0], train.class_labels, rows_N, embedded[1], test, "accuracy", **rule)
        searching = time.perf_counter() - began
    epoch = median([_epoch(clip, train) for _ in range(count)])
    searched, final = asked[:-1], asked[-1]
    tests = final[1] * epoch * len(test.samples) / len(train.samples)
    passes = sum(heads * epochs for heads, epochs in searched) + final[1]
    together = sum(epochs for _, epochs in searched) + final[1]
    repeated, shared = passes * epoch + tests, together * epoch + tests
    work = f"search, {sum(heads for heads, _ in searched)} classifiers of {searched[0][1]} epochs"
    rows = [
        (f"encode {len(train.samples):,} training and {len(test.samples):,} test images once", f"{encoding:.1f}"),
        (f"{work}, and final fit, {final[1]} epochs", f"{searching:.1f}"),
        ("one epoch of the encoder over the training images", f"{epoch:.1f}"),
        (f"the same with the encoder in each epoch, {passes:,} of them (extrapolated)", f"{repeated:,.0f}"),
        (f"and with those of a step together, as here: {together:,} of them (extrapolated)", f"{shared:,.0f}"),
    ]
    click.echo(table(("what", "seconds"), rows))
    for name, seconds in (("one classifier at a time, as ELEVATER's code does it", repeated), ("together", shared)):
        whole = f"{seconds / (encoding + searching):,.0f}x with their encoding"
        click.echo(f"against {name}: on cached features {seconds / searching:,.0f}x as fast, {whole}")
    click.echo(
        "extrapolated: every epoch is as long as the measured one, over what is trained on and what validates; the "
        f"{final[1]} final ones see the test images too; the classifiers themselves take no time"
    )
    name = Path(clip.identity.name.removeprefix("local-dir:")).name
    facts = f"{name}, {images.name}, {len(images.classnames)} classes, {clip.identity.embed_dim} wide"
    click.echo(f"{machine()}; {facts}; median of {count} epochs of the encoder")


def training_and_test_parts(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Training and test images: of each class every fifth is a test image."""
    nth_N = np.zeros(len(images.samples), np.int64)
    for label in np.unique(images.class_labels):
        places = np.flatnonzero(images.class_labels == label)
        nth_N[places] = np.arange(len(places))
    parts = []
    for split, chosen_N in (("train", (nth_N + 1) % _TEST_EVERY > 0), ("test", (nth_N + 1) % _TEST_EVERY == 0)):
        samples = [images.samples[place] for place in np.flatnonzero(chosen_N)]
        parts.append(replace(images, split=split, samples=samples, labels=images.class_labels[chosen_N]))
    return parts[0], parts[1]


@contextmanager
def _counted() -> Iterator[list[tuple[int, int]]]:
    """How many classifiers were trained together for how many epochs, each time."""
    asked: list[tuple[int, int]] = []
    theirs = probing.train_heads

    def train_heads(data: Any, targets: Any, initial: Any, rates: list[float], decays: Any, epochs: int) -> Any:
        asked.append((len(rates), epochs))
        return theirs(data, targets, initial, rates, decays, epochs)

    probing.train_heads = train_heads  # type: ignore[assignment]
    yield asked
    probing.train_heads = theirs


def _epoch(clip: Clip, images: ImageSet) -> float:
    """Seconds to read, decode and encode every image, as `features` does but without keeping anything."""
    preprocess = Preprocess(clip.identity.preprocessing, exact=True)
    began = time.perf_counter()
    for pixels_B3HW, _ in images.batches(preprocess, 64, cpus()):
        clip.encode_images(pixels_B3HW)
    return time.perf_counter() - began


def _memory(folder: Path, rows: int, dim: int, classes: int, heads: int) -> None:
    """The search with `heads` classifiers and one epoch each time, over features that do not fit what is kept in
    memory."""
    rng = np.random.default_rng(0)
    labels_N = np.arange(rows) % classes
    known: dict[str, Any] = {"name": "random", "where": "", "layout": "none", "samples": [], "files": []}
    test = ImageSet(split="test", labels=np.arange(_TEST_ROWS) % classes, **known)
    train_features = _random(folder / "train.zarr", labels_N, dim, rng)
    test_features = _random(folder / "test.zarr", test.class_labels, dim, rng)
    before = _rss()["RssAnon"]
    probing.RATES, probing.DECAYS = np.logspace(-4, -1, heads).tolist(), [1e-6]
    probing.SEARCH_EPOCHS = probing.FINAL_EPOCHS = 1
    heads_CD = torch.nn.functional.normalize(torch.randn(classes, dim), dim=1)
    with _Watch() as watch:
        began = time.perf_counter()
        probe(train_features, labels_N, np.arange(rows), test_features, test, "accuracy", heads_CD=heads_CD)
        seconds = time.perf_counter() - began
    size = rows * dim * 4
    cells = (f"{rows:,} x {dim}", f"{size / 1e9:.2f}", f"{before / 1e9:.2f}", f"{watch.own / 1e9:.2f}",
             f"{watch.files / 1e9:.2f}", f"{seconds:.0f}")  # fmt: skip
    head = ("features", "GB", "own memory before, GB", "at most", "mapped files, at most", "seconds")
    click.echo(table(head, [cells]))
    click.echo(f"{machine()}; {classes:,} classes, {heads} classifiers, one epoch of search and one of the final fit")


def _random(path: Path, labels_N: np.ndarray[Any, Any], dim: int, rng: np.random.Generator) -> Features:
    """A finished feature store of unit vectors about one centre a class."""
    summary = SourceSummary(arguments=(), files=0, bytes=0, digest="", repeated_keys=0, problems=())
    schema = EmbeddingStore(
        kind="image", rows=len(labels_N), dim=dim, chunk_rows=_SHARD_ROWS, shard_rows=_SHARD_ROWS, batch_size=64,
        teacher=replace(TEACHER, embed_dim=dim), source=summary, dtype="float32",
    )  # fmt: skip
    ranges = [schema.shard_range(shard) for shard in range(schema.shards)]
    digests = []
    for shard, (start, stop) in enumerate(ranges):
        columns: dict[str, Any] = {"row": np.arange(start, stop), "key": [f"{row:09}" for row in range(start, stop)]}
        columns |= {"file": [""] * (stop - start), "offset": [0] * (stop - start), "size": [0] * (stop - start)}
        digests.append(write_plan(str(path), shard, pa.table(columns, schema=IMAGE_PLAN)))
    store = create_store(str(path), schema, digests, [])
    centre_CD = rng.standard_normal((int(labels_N.max()) + 1, dim), dtype=np.float32)
    for shard, (start, stop) in enumerate(ranges):
        values_ND = centre_CD[labels_N[start:stop]] + 3 * rng.standard_normal((stop - start, dim), dtype=np.float32)
        values_ND /= np.linalg.norm(values_ND, axis=1, keepdims=True)
        arrays = {EMBEDDING: values_ND, STATUS: np.full(stop - start, Status.OK, np.uint8)}
        store.write_shard(shard, arrays, (), device="none", seconds=0)
    return Features(store)


@dataclass
class _Watch:
    """The largest memory of this process, looked at a few times a second: its own, and pages of files, which the system
    takes back when it needs them."""

    own: int = 0
    files: int = 0

    def __enter__(self) -> "_Watch":
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            found = _rss()
            self.own, self.files = max(self.own, found["RssAnon"]), max(self.files, found["RssFile"])


def _rss() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
