"""Planning and training over URLs: requests, bytes and seconds against an object store that answers after a while.

The store is this process's memory behind the name s3://, where each request waits for a round trip and for its bytes.
What a request costs s3fs itself is measured against moto's server.
"""

import io
import json
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.measure import machine, table
from benchmarks.simulated import simulate
from dimefm.sample import sample_dir
from dimefm.sources.account import Account
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.read_image import ImagePlace
from dimefm.store import ranged_array
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.read_ahead import in_order
from dimefm.training.batch_loader import Request
from dimefm.training.image_batches import Augmentation, TrainingImages
from dimefm.training.row_order import Order

_DIM, _BATCH, _MOTO_REQUESTS = 768, 1024, 500
_MEMBERS = {20_000: 1000, 200_000: 200, 1_500_000: 30}  # of a tar, by bytes of each
_TARS = 4


class Distant(MemoryFileSystem):
    """Files in memory, a round trip away."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012  # as MemoryFileSystem has its own
    pseudo_dirs = [""]  # noqa: RUF012
    latency, bytes_per_second = 0.0, float("inf")
    requests = sent = 0
    _lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("s3://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        data = super().cat_file(path, start=start, end=end, **options)
        with self._lock:
            Distant.requests += 1
            Distant.sent += len(data)
        time.sleep(self.latency + len(data) / self.bytes_per_second)
        return data


@click.command()
@click.option("--latency", default=0.02, show_default=True, help="Seconds of a round trip.")
@click.option("--bandwidth", default=90e6, show_default=True, help="Bytes a second of a connection.")
@click.option("--rows", default=200_000, show_default=True, help="Of the store.")
@click.option("--batches", default=8, show_default=True)
def urls(latency: float, bandwidth: float, rows: int, batches: int) -> None:
    """Requests, bytes and seconds of planning and training over URLs."""
    click.echo(f"s3fs: {1e3 * _cpu_of_a_request():.1f} ms of a core for each request\n")
    fsspec.register_implementation("s3", Distant, clobber=True)
    Distant.latency, Distant.bytes_per_second = latency, bandwidth
    head = ("requests", "MB", "seconds")
    click.echo(table(("tars of", "planned by", *head), [line for size in _MEMBERS for line in _plan(size)]) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        click.echo(table((f"batches of {_BATCH:,} rows", "read by", *head), _rows(Path(folder), rows, batches)) + "\n")
        click.echo(table(("decoded and cropped", "read", *head), _images(Path(folder), batches)))
    click.echo(f"{machine()}; {1e3 * latency:g} ms a round trip, {bandwidth / 1e6:g} MB/s a connection")


def _measured(call: Callable[[], object]) -> tuple[str, str, str]:
    Distant.requests = Distant.sent = 0
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    return f"{Distant.requests:,}", f"{Distant.sent / 1e6:,.1f}", f"{seconds:,.2f}"


def _plan(size: int) -> list[tuple[str, ...]]:
    """Tars with members of `size` bytes, planned by headers and by side files."""
    fs, count = fsspec.filesystem("s3"), _MEMBERS[size]
    sink = io.BytesIO()
    files = {}
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = size
            files[member.name] = {"offset": sink.tell() + tarfile.BLOCKSIZE, "size": size}
            tar.addfile(member, io.BytesIO(bytes(size)))
    data = sink.getvalue()
    for number in range(_TARS):
        fs.pipe_file(f"tars/{number}.tar", data)
    rows = []
    for kind in ("headers", "side files"):
        if kind == "side files":
            for number in range(_TARS):
                fs.pipe_file(f"tars/{number}.json", json.dumps({"filesize": len(data), "files": files}).encode())
        cost = _measured(lambda: deque(open_image_source(["s3://tars"]).samples(Account()), maxlen=0))
        rows.append((f"{count:,} x {size / 1e3:,.0f} kB", kind, *cost))
    fs.rm("tars", recursive=True)
    return rows


def _copy(folder: Path, name: str) -> None:
    fs = fsspec.filesystem("s3")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        fs.pipe_file(f"{name}/{path.relative_to(folder)}", path.read_bytes())


def _rows(folder: Path, rows: int, batches: int) -> list[tuple[str, ...]]:
    """Embeddings of random batches from all of a store, too large to be kept, and of batches in the trainer's order."""
    simulate(folder / "s.zarr", "image", rows, _DIM, [str(path) for path in _sample_tars()])
    _copy(folder / "s.zarr", "s.zarr")
    rng = np.random.default_rng(0)
    scattered = [rng.integers(0, rows, _BATCH) for _ in range(batches)]
    order = Order(store=Store(str(folder / "s.zarr")), seed=0, batch_size=_BATCH, kind="chunks")
    ordered = [rows_G for _, _, rows_G in order.steps(0, batches)]
    found = []
    for what, chosen in (("scattered", scattered), ("in order", ordered)):
        for reader in ("zarr-python", "ranges"):
            with ExitStack() as stack:
                stack.enter_context(patch.object(ranged_array, "KEPT_BYTES", min(ranged_array.KEPT_BYTES, rows * _DIM)))
                store = Store("s3://s.zarr")
                if reader == "zarr-python":
                    for array in store._arrays.values():
                        stack.enter_context(patch.object(array, "direct", None))
                cost = _measured(lambda store=store, chosen=chosen: [store.gather(one) for one in chosen])  # type: ignore[misc]
            found.append((f"{len(chosen)}, {what}", reader, *cost))
    return found


def _images(folder: Path, batches: int) -> list[tuple[str, ...]]:
    """Images of tars, by one loader process."""
    for path in _sample_tars():
        fsspec.filesystem("s3").pipe_file(f"images/{path.name}", path.read_bytes())
    samples = list(open_image_source(["s3://images"]).samples(Account()))[: batches * 64]
    places = [ImagePlace(sample.file, sample.offset, sample.size) for sample in samples]
    dataset = TrainingImages("s3://s.zarr", Augmentation(size=64, crop_scale=(0.4, 1.0), flip=True, seed=0))
    rows_B = np.arange(len(places))
    request = Request(0, 0, rows_B, rows_B, places)
    dataset[request]  # embeddings are kept from here on
    found = []
    for name, ahead in (("one at a time", False), (f"{storage.CONNECTIONS} at a time", True)):
        with ExitStack() as stack:
            if not ahead:
                stack.enter_context(
                    patch("dimefm.training.image_batches.reading_ahead", lambda work, items, path: map(work, items))
                )
            found.append((f"{len(places)} images", name, *_measured(lambda: dataset[request])))
    return found


def _sample_tars() -> list[Path]:
    return sorted((sample_dir() / "images").glob("train-*.tar"))


def _cpu_of_a_request() -> float:
    """Seconds of CPU time of this process for each small range that it reads from S3."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    environment = {"AWS_ENDPOINT_URL": ours.recv(), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    try:
        with patch.dict("os.environ", {**environment, "AWS_DEFAULT_REGION": "us-east-1"}):
            fs, _ = storage.filesystem("s3://bucket")
            fs.mkdir("bucket")
            storage.write_atomic("s3://bucket/x", bytes(1 << 20))
            began = time.process_time()
            for _ in in_order(lambda at: storage.read_bytes("s3://bucket/x", at * 1536, 1536), range(_MOTO_REQUESTS)):
                pass
            return (time.process_time() - began) / _MOTO_REQUESTS
    finally:
        server.terminate()
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def _serve(pipe: Any) -> None:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    pipe.send(f"http://{host}:{port}")
    threading.Event().wait()
