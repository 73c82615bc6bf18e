"""Copies between memory and a GPU that go on beside its computing. On a CPU there is nothing to copy or to wait for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class Transfer:
    """Copies of one process to one device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, for whatever is enqueued there after this call.

        Page-locked memory is copied while earlier work still computes, and must stay as it is until a result of later
        work has arrived; other memory is copied before this returns.
        """
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            sent = tensor.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        sent.record_stream(computing)
        return sent


@dataclass(frozen=True)
class Arriving:
    """Tensors on their way to memory: `wait` before they are read."""

    tensors: tuple[torch.Tensor, ...]
    _event: torch.cuda.Event | None

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors, once they are there; what was enqueued on the device after `fetch` is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self.tensors


def fetch(*tensors: torch.Tensor) -> Arriving:
    """Begin to copy tensors to memory, behind what their device has been given to do until now."""
    if not tensors[0].is_cuda:
        return Arriving(tensors, None)
    arriving = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)  # into page-locked memory
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensors[0].device))
    return Arriving(arriving, event)
