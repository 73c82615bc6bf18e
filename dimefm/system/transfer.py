"""Copies between memory and a GPU while the GPU computes. On a CPU there is nothing to copy or to wait for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class Transfer:
    """Copies from this process to one device, on a separate CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, for work that is enqueued there after this call.

        Page-locked memory is copied while earlier work still computes, and must not be changed until a result of later
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
    """Tensors on their way to memory; call `wait` before reading them."""

    tensors: tuple[torch.Tensor, ...]
    _event: torch.cuda.Event | None

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Wait until the tensors have arrived; not for work that was enqueued on the device after `fetch`."""
        if self._event is not None:
            self._event.synchronize()
        return self.tensors


def fetch(*tensors: torch.Tensor) -> Arriving:
    """Begin to copy tensors to memory, after the work that their device has been given until now."""
    if not tensors[0].is_cuda:
        return Arriving(tensors, None)
    arriving = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)  # into page-locked memory
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensors[0].device))
    return Arriving(arriving, event)
