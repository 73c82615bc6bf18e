"""Images that end the process which decodes them: by a crash of the decoder, or because they take all memory.

A shard that lost its process is done again with its images decoded in a process of their own first. What that one dies
of is looked at alone, and where it dies again the row gets a status; the others are encoded as ever. An ordinary run
decodes in its own threads and pays nothing for this.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from cache_schemas import EmbeddingStore
from dimefm.caching.gpu_image_loader import open_loader
from dimefm.errors import DimefmError, StoreError
from dimefm.images.decode import DecodeError
from dimefm.sources.read_image import CRASH
from dimefm.system import storage

_RUNNING = ".running"
_MOST_MEMORY = 8 << 30  # bytes that images may take in such a process: one, or all that are decoded at once
_MEMORY, _OVER = 77, b"over"  # the exit code of a process whose images took more; its last line where it did not die

Rows = list[dict[str, Any]]


@contextmanager
def running(store: str) -> Iterator[bool]:
    """Around a run that decodes in its own process: whether an earlier one over this store ended without a word, by a
    crash or a kill. A hidden file in the store says so; a run that ends by an error or by Ctrl-C removes it."""
    path = storage.join(store, _RUNNING)
    died = storage.exists(path)
    with storage.writing_to(store):
        storage.write_atomic(path, b"")
    try:
        yield died
    except BaseException:
        with suppress(OSError, StoreError):  # what ended the run is what is told
            storage.remove_file(path)
        raise
    storage.remove_file(path)


def without_crashes(rows: Rows, schema: EmbeddingStore, device: torch.device, threads: int) -> Rows:
    """The same rows of a plan; those that end a process, and do so alone too, with the reason as their CRASH."""
    request = {"schema": schema.to_json(), "device": str(device), "threads": threads, "rows": rows}
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-P", "-m", "dimefm.caching.crashing_images"],
        input=json.dumps(request).encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    crashing = json.loads(process.stdout) if process.returncode == 0 else {}
    return [{**row, CRASH: crashing[str(row["row"])]} if str(row["row"]) in crashing else row for row in rows]


def main() -> None:
    """In a process that has neither threads nor a GPU, and so can be forked: look for the rows that standard input
    names, and answer on standard output."""
    output = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.load(sys.stdin)
    schema = EmbeddingStore.parse(request["schema"], "standard input")
    found = _crashing(request["rows"], schema, torch.device(request["device"]), request["threads"])
    os.write(output, json.dumps(found).encode())


def _crashing(rows: Rows, schema: EmbeddingStore, device: torch.device, threads: int) -> dict[int, str]:
    """Why each of those rows is not to be decoded, by its number."""
    found: dict[int, str] = {}
    while rows:
        begun, done, end = _decode_apart(rows, schema, device, threads)
        if end is None or not begun:  # all were decoded, or no image is to blame
            break
        suspects = [rows[place] for place in sorted(begun - done)]
        if len(rows) > 1:
            found |= _crashing(suspects, schema, device, 1)
        elif suspects:
            found[rows[0]["row"]] = end
        rows = [row for place, row in enumerate(rows) if place not in begun]
    return found


def _decode_apart(
    rows: Rows, schema: EmbeddingStore, device: torch.device, threads: int
) -> tuple[set[int], set[int], str | None]:
    """Decode rows in a forked process: the places of those that it began, of those that it was done with, and what it
    died of; None where it did not."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            _decode(rows, schema, device, threads, writing)
        except DimefmError:  # such as a storage that does not answer: the worker meets it as well, and says so
            pass
        except Exception:
            traceback.print_exc()
        os.write(writing, _OVER + b"\n")
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:  # noqa: PTH123  # a descriptor
        lines = [line.split() for line in file]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    begun, done = ({int(line[1]) for line in lines if line[0] == word} for word in (b"begin", b"done"))
    if lines and lines[-1] == [_OVER]:
        return begun, done, None
    end = f"exit code {code}"
    if code < 0:
        end = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if code == _MEMORY:
        end = f"more than {_MOST_MEMORY:,} bytes of memory"
    return begun, done, f"decoding it ends the process: {end}"


def _decode(rows: Rows, schema: EmbeddingStore, device: torch.device, threads: int, output: int) -> None:
    """Decode rows on threads, and say of each when it is begun and done."""
    _be_modest(device)
    loader = open_loader(schema, device, accept_missing=True)  # what is not there ends nothing

    def decode(place: int) -> None:
        os.write(output, b"begin %d\n" % place)
        for (loaded,), _ in loader.batches([rows[place]], 1, 1):
            if isinstance(loaded, DecodeError) and isinstance(loaded.__cause__, MemoryError):
                os._exit(_MEMORY)
        os.write(output, b"done %d\n" % place)

    pool = ThreadPoolExecutor(threads)
    try:
        for _ in pool.map(decode, range(len(rows))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _be_modest(device: torch.device) -> None:
    """Die before the worker does where memory runs out, and leave no core dump."""
    torch.set_num_threads(1)
    with suppress(OSError, ValueError):  # not on every system
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if device.type == "cpu":  # CUDA takes more than it uses
            now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (now + _MOST_MEMORY, resource.RLIM_INFINITY))
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
