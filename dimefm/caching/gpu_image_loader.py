"""Decode and preprocess images on a GPU by nvJPEG, for machines with too few cores for their GPU.

The pixels are close to those of the CPU's decoder but not the same: a JPEG stores its colours at half the size, which
nvJPEG repeats and libjpeg interpolates. Images decoded by one must not be mixed with images decoded by the other.
Shapes: B images in a batch, H height, W width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from cache_schemas import EmbeddingStore, Preprocessing
from cache_schemas.plan import PlannedImage
from dimefm.caching.image_loader import NOTHING_KNOWN, Known, Loaded, Loader, or_reason, read_planned_image
from dimefm.errors import StoreError
from dimefm.images.decode import DecodeError, jpeg_size
from dimefm.images.preprocess import Preprocess

_BASELINE, _END = 0xC0, b"\xff\xd9"
_OTHER_FRAMES = {*range(0xC1, 0xD0)} - {0xC4, 0xC8, 0xCC}  # progressive, lossless, arithmetic
_EXIF = b"Exif\0\0"


_AHEAD = 2  # batches whose bytes are read before they are needed


class GpuLoader:
    """Like caching.image_loader.Loader, but images are decoded on a GPU, where their pixels stay."""

    def __init__(self, schema: EmbeddingStore, device: torch.device, *, accept_missing: bool = False) -> None:
        """`accept_missing`: see sources.read_image. Raises StoreError where `device` is no GPU, or no nvJPEG is
        installed."""
        self._read = partial(read_planned_image, accept_missing=accept_missing)
        if device.type != "cuda":
            what = "the images of this store are decoded by nvJPEG, on a GPU"
            raise StoreError(what, remedy="go on where there is one, or cache into a new --out with --decoder fast")
        try:
            self._preprocess = GpuPreprocess(schema.teacher.preprocessing, device)
        except ImportError as error:
            raise StoreError(f"no nvJPEG here: {error}", remedy="pip install torchcodec, of CUDA") from error
        self._size, self._device, self._stream = schema.teacher.preprocessing.size, device, torch.cuda.Stream(device)

    def batches(
        self, images: list[PlannedImage], size: int, threads: int, *, pin: bool = False
    ) -> Iterator[tuple[list[Loaded | DecodeError], torch.Tensor]]:
        """As Loader.batches. Bytes are read on threads ahead of need, and decoded on a separate CUDA stream while the
        teacher computes. There is nothing to `pin`."""
        parts = [images[at : at + size] for at in range(0, len(images), size)]
        waiting: deque[list[Future[bytes | DecodeError]]] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            for number in range(-_AHEAD, len(parts)):
                if number + _AHEAD < len(parts):
                    waiting.append([pool.submit(self._read, image) for image in parts[number + _AHEAD]])
                if number >= 0:
                    yield self._decoded([read.result() for read in waiting.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    def _decoded(self, datas: list[bytes | DecodeError]) -> tuple[list[Loaded | DecodeError], torch.Tensor]:
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            images = iter(self._preprocess([data for data in datas if isinstance(data, bytes)]))
            found = [next(images) if isinstance(data, bytes) else data for data in datas]
            good = [one for one in found if isinstance(one, torch.Tensor)]
            empty = torch.empty((0, 3, *self._size), dtype=torch.uint8, device=self._device)
            pixels_B3HW = torch.stack(good) if good else empty
        computing.wait_stream(self._stream)
        pixels_B3HW.record_stream(computing)
        places = iter(pixels_B3HW)
        return [one if isinstance(one, DecodeError) else Loaded(next(places)[None]) for one in found], pixels_B3HW


class GpuPreprocess:
    """A batch of encoded images to uint8 tensors (3, H, W) of the model's input size on `device`.

    Baseline JPEGs that seem whole are decoded by nvJPEG and resized on the device, with the geometry of Preprocess. All
    other images go through Preprocess on the CPU, and so do all of a batch in which nvJPEG fails: it does not report at
    which image. Not safe in threads, as it waits for the device's current stream.
    """

    def __init__(self, facts: Preprocessing, device: torch.device | str) -> None:
        self._on_cpu, self._device = Preprocess(facts), torch.device(device)
        self._decode = nvjpeg()

    def __call__(self, datas: list[bytes]) -> list[torch.Tensor | DecodeError]:
        """The image of each, or why it cannot be decoded."""
        chosen = [place for place, data in enumerate(datas) if self._on_cpu.resizes_tensors and is_baseline(data)]
        images: dict[int, torch.Tensor] = {}
        if chosen:
            if self._device.type == "cuda":
                # nvJPEG writes on another stream, into memory that kernels on this one may still be reading.
                torch.cuda.current_stream(self._device).synchronize()
            try:
                decoded = self._decode([_without_exif(datas[place]) for place in chosen], self._device)
                images = dict(zip(chosen, decoded, strict=True))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                pass  # nvJPEG found an image that is damaged, or of a kind that it does not know
        return [or_reason(partial(self._one, data, images.get(place))) for place, data in enumerate(datas)]

    def _one(self, data: bytes, decoded: torch.Tensor | None) -> torch.Tensor:
        if decoded is not None:
            return self._on_cpu.apply(decoded)
        return self._on_cpu(data).to(self._device)


def open_loader(
    schema: EmbeddingStore, device: torch.device, *, accept_missing: bool = False, known: Known = NOTHING_KNOWN
) -> Loader | GpuLoader:
    """The loader of a store's images for a teacher on `device`. `accept_missing`: see sources.read_image."""
    if schema.decoder == "nvjpeg":
        return GpuLoader(schema, device, accept_missing=accept_missing)
    return Loader(schema, accept_missing=accept_missing, known=known)


def nvjpeg() -> Callable[[list[torch.Tensor], torch.device], list[torch.Tensor]]:
    """The decoder of a list of JPEGs, uint8 (bytes,) on the CPU, to uint8 RGB (3, H, W) on a device: torchcodec's where
    it is installed (0.16 or newer), else torchvision's, which is deprecated since 0.29. Raises ImportError."""
    try:
        from torchcodec.decoders import decode_jpeg as of_torchcodec
    except (ImportError, OSError, RuntimeError):  # not installed, too old, or built for another torch or CUDA
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as of_torchvision

        return lambda encoded, device: of_torchvision(encoded, mode=ImageReadMode.RGB, device=device)
    return lambda encoded, device: of_torchcodec(encoded, mode="RGB", device=device)


def is_baseline(data: bytes) -> bool:
    """Whether these are the bytes of a baseline JPEG in grey or colour, with the mark at its end: the kind that a GPU's
    JPEG engine decodes. nvJPEG decodes progressive ones too, but one by one and slower than a CPU."""
    if jpeg_size(data) is None or not data.endswith(_END):
        return False
    at = 2
    while data[at : at + 1] == b"\xff":
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _BASELINE or marker in _OTHER_FRAMES:
            return marker == _BASELINE
        at += 2 + size
    return False


def _without_exif(data: bytes) -> torch.Tensor:
    """The bytes without their EXIF mark: torchcodec would turn the image by its orientation; open_clip does not."""
    return torch.frombuffer(bytearray(data.replace(_EXIF, bytes(len(_EXIF)), 1)), dtype=torch.uint8)
