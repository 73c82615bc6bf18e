"""This machine and its limits: the device and its precision, cores, memory, shared memory, open files.

Defaults that depend on the machine are decided here, by what it can do and never by a timing: a machine that happens to
be busy must not produce another student.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from cache_schemas.identity import Precision
from dimefm.errors import DimefmError

SHARED_MEMORY = Path("/dev/shm")
_PROCESS = Path("/proc/self")
_MOST_FILES = 65536  # more are of no use, and some libraries loop over all descriptors that could be open


def choose_device(asked: str | None) -> str:
    """`asked`, or by default cuda where torch sees a GPU, else cpu. Raises DimefmError if cuda is asked for without a
    GPU."""
    import torch

    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        raise DimefmError("--device cuda: torch sees no GPU here", remedy="give --device cpu, or mend the CUDA set-up")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(device: str) -> Precision:
    """The precision of a student's matrix products on `device` of this machine, by what it can do.

    GPU: bf16 where it is not emulated (from Ampere on), else fp16. CPU: bf16 only with AMX tiles, else fp32: with
    AVX512_BF16 alone dense towers gain up to twice, and depthwise convolutions lose as much; without it bf16 is
    emulated, at a tenth of the speed of fp32 (`python -m benchmarks cpu`).
    """
    if not device.startswith("cuda"):
        return "bf16" if _has_amx() else "fp32"
    import torch

    if not torch.cuda.is_available():
        return "bf16"  # the GPU is on another machine
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def emulates(precision: Precision, device: str) -> bool:
    """Whether matrix products of that precision are only emulated here, which is slow. For a GPU this follows from
    `choose_precision`."""
    if device.startswith("cuda"):
        return precision == "bf16" and choose_precision(device) != "bf16"
    import torch

    native = cpu_kind() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return precision == "fp16" or (precision == "bf16" and not native)


def _has_amx() -> bool:
    """Whether bf16 products run in AMX tiles: the processor has them, and ATEN_CPU_CAPABILITY, by which one imitates an
    older processor, does not forbid them."""
    import torch

    return cpu_kind() == "AVX512" and bool(torch.cpu._is_amx_tile_supported())


def cpu_kind() -> str:
    """The vector instructions that torch uses here: AVX2, AVX512, DEFAULT and the like."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def describe(device: str) -> str:
    """The facts of a device that decide how numbers are rounded: `x86_64 AVX512 AMX`, or the name of the GPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {cpu_kind()}{' AMX' if _has_amx() else ''}"


def wait_briefly() -> None:
    """Let torch's idle threads sleep after microseconds instead of milliseconds. Must be called before torch is loaded.

    A thread that waits in a loop takes a core from threads that have work to do. With one busy neighbour on two cores,
    a training run falls to a third of its speed by default, and only to half with this; undisturbed it is no slower
    (`python -m benchmarks cpu`). It sets a variable of the OpenMP library that torch brings on Linux, unless the user
    has set one.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cpus() -> int:
    """CPU cores that this process may use, by its affinity and the quotas of its control groups; at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [int(quota) / int(period) for quota, period in _cpu_quotas() if quota.isdigit() and period.isdigit()]
    return max(1, int(min([allowed, *quotas])))


def processes_here() -> int:
    """The processes of one training run on this machine, as torchrun says; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cpu_quotas() -> Iterator[tuple[str, str]]:
    for text in _settings("", "cpu.max"):
        quota, _, period = text.partition(" ")
        yield quota, period
    quotas, periods = _settings("cpu", "cpu.cfs_quota_us"), _settings("cpu", "cpu.cfs_period_us")
    yield from zip(quotas, periods, strict=False)


def available_memory() -> int:
    """Bytes of memory that this process may use: those of the machine, or less where `ulimit -v` or one of its nested
    control groups allows less. Memory above memory.high does not count: its use is slowed down to a standstill."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit)
    limits = [
        *_settings("", "memory.max"),
        *_settings("", "memory.high"),
        *_settings("memory", "memory.limit_in_bytes"),
    ]
    for statistics in _settings("memory", "memory.stat"):  # includes groups that cannot be seen from within a container
        limits += [line.split()[-1] for line in statistics.splitlines() if line.startswith("hierarchical_memory_limit")]
    return min(found + [int(text) for text in limits if text.isdigit()])


def _settings(controller: str, name: str) -> list[str]:
    """The contents of a settings file, in the control group of this process and in each group around it, as far as they
    are mounted here. The controller "" stands for control groups of version 2."""
    own, mounts = _PROCESS / "cgroup", _PROCESS / "mountinfo"
    if not own.exists() or not mounts.exists():
        return []
    lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    paths = [PurePosixPath(path) for _, controllers, path in lines if controller in controllers.split(",")]
    found: dict[Path, None] = {}
    for path in paths:
        for root, mount in _mounts(mounts.read_text(), controller):
            # In a container the mounted group may be the container's own, which has another name outside.
            inside = path.is_relative_to(root) and ".." not in path.parts
            folder = mount / path.relative_to(root) if inside else mount
            found |= dict.fromkeys(p / name for p in (folder, *folder.parents) if p == mount or mount in p.parents)
    return [file.read_text().strip() for file in found if file.is_file()]


def _mounts(mountinfo: str, controller: str) -> Iterator[tuple[PurePosixPath, Path]]:
    """Where the groups of a controller are mounted, each after the group that is the root there; see
    proc_pid_mountinfo(5)."""
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = (*rest.split(" "), "", "")[:3]
        if (kind == "cgroup2" and not controller) or (kind == "cgroup" and controller in options.split(",")):
            root, mount = (name.replace("\\040", " ") for name in fields.split(" ")[3:5])
            yield PurePosixPath(root), Path(mount)


def free_shared_memory() -> int | None:
    """Bytes free in /dev/shm, through which loader processes hand over batches; None where it does not exist."""
    if not SHARED_MEMORY.is_dir():
        return None
    found = os.statvfs(SHARED_MEMORY)
    return found.f_bavail * found.f_frsize


@cache
def open_files() -> int:
    """How many files this process may have open; raises its soft limit to the hard one first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return most if soft == resource.RLIM_INFINITY else min(soft, _MOST_FILES)
