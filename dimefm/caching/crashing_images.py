"""Find images that end the process which decodes them: they crash the decoder, or take all memory.

A shard that lost its process is done again, and its images are first decoded in a process of their own. If that one
dies, the images that it was decoding are tried alone, and one that ends its process again gets the status CRASHED. The
others are encoded as usual. An ordinary run decodes in its own threads and pays nothing for this.
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

import torch

from cache_schemas import EmbeddingStore
from cache_schemas.plan import PlannedImage
from dimefm.caching.gpu_image_loader import open_loader
from dimefm.errors import DimefmError, StoreError
from dimefm.images.decode import DecodeError
from dimefm.system import storage

_RUNNING = ".running"
_MOST_MEMORY = 8 << 30  # bytes that images may take in such a process, all that are decoded at once together
_MEMORY, _OVER = 77, b"over"  # the exit code of a process whose images took more; the last line of one that did not die

Images = list[PlannedImage]


@contextmanager
def running(store: str) -> Iterator[bool]:
    """A block around a run that decodes in its own process. It gets whether an earlier run over this store was ended by
    a crash or a kill: a hidden file in the store stands for a run, which removes it if it ends in any other way."""
    path = storage.join(store, _RUNNING)
    died = storage.exists(path)
    with storage.writing_to(store):
        storage.write_atomic(path, b"")
    try:
        yield died
    except BaseException:
        with suppress(OSError, StoreError):  # what ended the run is the error to report
            storage.remove_file(path)
        raise
    storage.remove_file(path)


def without_crashes(images: Images, schema: EmbeddingStore, device: torch.device, threads: int) -> Images:
    """The same images; those that end the process which decodes them, also when alone, with `crash` set."""
    request = {"schema": schema.to_json(), "device": str(device), "threads": threads, "images": images}
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-P", "-m", "dimefm.caching.crashing_images"],
        input=json.dumps(request).encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    crashing = json.loads(process.stdout) if process.returncode == 0 else {}
    return [image._replace(crash=crashing.get(str(image.row))) for image in images]


def main() -> None:
    """In a process that has neither threads nor a GPU, and so can be forked: try the images that standard input names,
    and answer on standard output."""
    output = os.dup(1)
    os.dup2(2, 1)  # libraries may print to it
    request = json.load(sys.stdin)
    schema = EmbeddingStore.parse(request["schema"], "standard input")
    images = [PlannedImage(*fields) for fields in request["images"]]
    found = _crashing(images, schema, torch.device(request["device"]), request["threads"])
    os.write(output, json.dumps(found).encode())


def _crashing(images: Images, schema: EmbeddingStore, device: torch.device, threads: int) -> dict[int, str]:
    """By row, why an image must not be decoded."""
    found: dict[int, str] = {}
    while images:
        begun, done, end = _decode_apart(images, schema, device, threads)
        if end is None or not begun:  # all were decoded, or no image is to blame
            break
        suspects = [images[place] for place in sorted(begun - done)]
        if len(images) > 1:
            found |= _crashing(suspects, schema, device, 1)
        elif suspects:
            found[images[0].row] = end
        images = [image for place, image in enumerate(images) if place not in begun]
    return found


def _decode_apart(
    images: Images, schema: EmbeddingStore, device: torch.device, threads: int
) -> tuple[set[int], set[int], str | None]:
    """Decode images in a forked process: the places of those that it began, of those that it finished, and what it died
    of, or None."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            _decode(images, schema, device, threads, writing)
        except DimefmError:  # such as storage that does not answer: the worker meets it as well, and reports it
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


def _decode(images: Images, schema: EmbeddingStore, device: torch.device, threads: int, output: int) -> None:
    """Decode images on threads, and write to `output` when each is begun and done."""
    _die_first(device)
    loader = open_loader(schema, device, accept_missing=True)  # a missing file ends no process

    def decode(place: int) -> None:
        os.write(output, b"begin %d\n" % place)
        for (loaded,), _ in loader.batches([images[place]], 1, 1):
            if isinstance(loaded, DecodeError) and isinstance(loaded.__cause__, MemoryError):
                os._exit(_MEMORY)
        os.write(output, b"done %d\n" % place)

    pool = ThreadPoolExecutor(threads)
    try:
        for _ in pool.map(decode, range(len(images))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _die_first(device: torch.device) -> None:
    """Set this process to be the first to die where memory runs out, before the worker, and to leave no core dump."""
    torch.set_num_threads(1)
    with suppress(OSError, ValueError):  # not on every system
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if device.type == "cpu":  # CUDA takes more than it uses
            now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (now + _MOST_MEMORY, resource.RLIM_INFINITY))
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
