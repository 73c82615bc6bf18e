"""What this machine is, and its limits by measurement."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.kit import Kit
from benchmarks.gpu.timing import copy_speed, peak, seconds
from dimefm.system.machine import available_memory, cpus, describe, free_shared_memory

_QUERIED = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"
_PACKAGES = (
    "torch", "torchvision", "torchcodec", "simplejpeg", "timm", "open_clip_torch", "zarr", "numpy", "triton",
    "faiss-gpu", "ray",
)  # fmt: skip


def facts(kit: Kit) -> None:
    """The device, its clocks at rest and at work, libraries, cores and memory; peaks of products and copies."""
    _card(kit, "at rest")
    for precision in ("bf16", "fp16", "tf32", "fp32"):
        rate = peak(kit, precision)
        kit.line(f"matrix product, {precision}", rate / 1e12, "TFLOP/s", f"{kit.sizes.product} cubed, random values")
    _card(kit, "after the products")
    kit.line("copy in the device's memory", copy_speed(kit) / 1e12, "TB/s", "bytes read and written")
    _to_device(kit)
    kit.line("cores", cpus(), "", f"{os.cpu_count()} in the machine, {describe('cpu')}")
    kit.line("memory", available_memory() / 1e9, "GB")
    shared = free_shared_memory()
    kit.line("/dev/shm, free", "none" if shared is None else shared / 1e9, "GB")
    kit.line("C++ compiler", shutil.which("c++") or "none", "", "torch.compile needs one")
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    kit.line("libraries", versions, "", f"Python {platform.python_version()}, {platform.platform()}")


def _card(kit: Kit, when: str) -> None:
    """What nvidia-smi says; it is only asked, nothing is set."""
    if kit.device.type != "cuda":
        return
    if when == "at rest":
        found = torch.cuda.get_device_properties(kit.device)
        at = f"CUDA {torch.version.cuda}, compute capability {found.major}.{found.minor}"
        kit.line("device", found.name, "", f"{at}, {found.multi_processor_count} multiprocessors")
        kit.line("device memory", found.total_memory / 1e9, "GB")
    words = ["nvidia-smi", f"--query-gpu={_QUERIED}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        answer = str(error)
    kit.line(f"nvidia-smi, {when}", answer, "", _QUERIED)


def _to_device(kit: Kit) -> None:
    """Copies from memory: a batch of images goes that way in every step."""
    size = kit.sizes.copy // 16
    target = torch.empty(size, dtype=torch.uint8, device=kit.device)
    for name, pinned in (("page-locked", True), ("ordinary", False)):
        source = torch.empty(size, dtype=torch.uint8, pin_memory=pinned and kit.device.type == "cuda").random_()
        spent = seconds([lambda source=source: target.copy_(source, non_blocking=True)], kit.device)
        kit.line(f"copy from {name} memory", size / spent / 1e9, "GB/s")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
