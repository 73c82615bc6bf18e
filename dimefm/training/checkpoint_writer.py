"""Writes checkpoints in a thread, from a copy of the state, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import Any, Self

import torch

from dimefm.system.transfer import fetch
from dimefm.training.checkpoints import Checkpoints


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on. The end of a `with` waits for the last of them.

    A StoreError in the thread is raised by whichever method is called next.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._copies: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        with suppress(Exception) if kind else nullcontext():  # or it would hide the error that ended the run
            self.wait()

    def begin(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Begin Checkpoints.save with the state as it is now, once the checkpoint before is written."""
        self.wait()
        arrived = _snapshot(state, self._copies)
        self._writing = self._thread.submit(lambda: self._checkpoints.save(step, arrived(), score))

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written, if there is one by now."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all is written."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()


def _snapshot(state: dict[str, Any], copies: list[torch.Tensor]) -> Callable[[], dict[str, Any]]:
    """Copy the state as it is now, without waiting for a GPU. The function that is returned waits for the copy, and
    gives it in memory.

    `copies` has the tensors that the snapshot before was copied to, and then those of this one: what is in memory is
    copied to the same place where it fits, since a page that is new takes several times as long.
    """
    on_gpu: list[torch.Tensor] = []
    before = iter(copies[:])
    copies.clear()

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            on_gpu.append(tensor)
            return tensor
        copy = next(before, None)
        copies.append(tensor.clone() if copy is None or not _alike(copy, tensor) else copy.copy_(tensor))
        return copies[-1]

    copied = _map_tensors(state, taken)
    arriving = fetch(*on_gpu) if on_gpu else None

    def arrived() -> dict[str, Any]:
        in_memory = iter(arriving.wait() if arriving else ())
        return _map_tensors(copied, lambda tensor: next(in_memory) if tensor.is_cuda else tensor)  # type: ignore[no-any-return]

    return arrived


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Nested values with `change` applied to every tensor, always in the same order."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_tensors(part, change) for name, part in value.items()}
    return [_map_tensors(part, change) for part in value] if isinstance(value, list) else value
