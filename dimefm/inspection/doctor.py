"""`dimefm doctor`: this machine on one screen, what it lacks, and the defaults that follow from it."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from dimefm.system import machine
from dimefm.system.notes import note
from dimefm.system.progress import amount
from dimefm.system.wording import counted

_NEEDED = {"torch": "torch", "torchvision": "torchvision", "open_clip": "open_clip_torch", "timm": "timm",
           "zarr": "zarr", "pyarrow": "pyarrow"}  # fmt: skip
_SMALL_SHM, _FEW_FILES, _LITTLE_DISK, _LITTLE_MEMORY = 1_000_000_000, 1024, 10_000_000_000, 4_000_000_000
_LEAST_FILES = 128  # below it not even two loader processes work
_MOSTLY_FREE = 0.8  # of a GPU's memory; torch's own context takes half a gigabyte


@dataclass(frozen=True)
class Finding:
    """A line of the diagnosis: its subject, what was found, and whether that is fine, deserves a look, or stops the
    work; in the last two cases `remedy` says what to do."""

    name: str
    value: str
    state: Literal["ok", "look", "stops"] = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order in which they are shown, and the commands' defaults on this machine."""

    findings: list[Finding]
    defaults: list[tuple[str, str]]

    @property
    def stops(self) -> bool:
        """Whether something would stop the work."""
        return any(finding.state == "stops" for finding in self.findings)

    def show(self) -> str:
        """As `dimefm doctor` prints it."""
        width = max(len(f.name) for f in self.findings)
        marks = {"ok": "ok   ", "look": "look ", "stops": "STOPS"}
        lines = []
        for f in self.findings:
            lines.append(f"{marks[f.state]}  {f.name:<{width}}  {f.value}")
            if f.remedy:
                lines.append(f"{'':5}  {'':<{width}}  -> {f.remedy}")
        lines += ["", "defaults on this machine"]
        return "\n".join([*lines, *(f"       {name:<{width}}  {value}" for name, value in self.defaults)])


def diagnose() -> Diagnosis:
    """Look at everything. Imports torch and faiss, and lets each GPU add two numbers; leaves no file behind."""
    note("importing the libraries, and trying each GPU ...")
    findings = [Finding("dimefm", f"{version('dimefm')}, Python {platform.python_version()}, {platform.platform()}")]
    missing = list(_missing())
    findings += missing
    findings += [*_cores_and_memory(), *_files()]
    if missing:
        return Diagnosis(findings, [])
    gpus = list(_gpus())
    findings += [_cpu(), _torch(), *gpus, _faiss(), _ray(), _jpeg()]
    return Diagnosis(findings, [] if any(gpu.state == "stops" for gpu in gpus) else _defaults())


def _missing() -> Iterator[Finding]:
    for module, package in _NEEDED.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken library raises anything
            reason = str(error).strip().splitlines()[-1]
            yield Finding(package, f"cannot be imported: {reason}", "stops", "pip install --force-reinstall dimefm")


def _cores_and_memory() -> Iterator[Finding]:
    there, cores = os.cpu_count() or 1, machine.cpus()
    less = "" if cores == there else f" of {there}, by affinity or control group"
    yield Finding("cores", f"{cores}{less}")
    memory, whole = machine.available_memory(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    less = "" if memory == whole else f" of {amount(whole)}, by control group"
    small = memory < _LITTLE_MEMORY
    remedy = "a large teacher may not fit; give --workers 1" if small else ""
    yield Finding("memory", f"{amount(memory)}{less}", "look" if small else "ok", remedy)
    shared = machine.free_shared_memory()
    if shared is not None:
        small = shared < _SMALL_SHM
        remedy = "loader processes hand batches over there: docker run --shm-size=8g, or --workers 0" if small else ""
        yield Finding("/dev/shm", f"{amount(shared)} free", "look" if small else "ok", remedy)


def _files() -> Iterator[Finding]:
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    most = machine.open_files()
    state: Literal["ok", "look", "stops"] = "stops" if most < _LEAST_FILES else "look" if most < _FEW_FILES else "ok"
    remedy = "" if state == "ok" else "raise the hard limit: ulimit -Hn 65536 as root, or the container's --ulimit"
    yield Finding("open files", f"{soft}, may be raised to {hard}", state, remedy)
    for name, folder in (("disk here", Path.cwd()), ("temporary", Path(tempfile.gettempdir()))):
        free, fine = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
        if not fine:
            remedy = "go to another folder" if name == "disk here" else "name one that may be written to with TMPDIR"
            yield Finding(name, f"{folder} may not be written to", "stops" if name == "temporary" else "look", remedy)
        else:
            small = free < _LITTLE_DISK
            remedy = "a million rows of 768 take 1.5 GB" if small else ""
            yield Finding(name, f"{amount(free)} free in {folder}", "look" if small else "ok", remedy)


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else f"{value:,}"


def _cpu() -> Finding:
    if machine.choose_precision("cpu") == "bf16":
        how = "bf16 in AMX tiles"
    elif machine.emulates("bf16", "cpu"):
        how = "bf16 only emulated, and slow"
    else:
        how = "bf16 by AVX512_BF16: faster for some towers, not for depthwise convolutions"
    return Finding("cpu", f"{machine.describe('cpu')}; {how}")


def _torch() -> Finding:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Finding("torch", f"{torch.__version__}, built with {built}")


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield from map(_gpu, range(torch.cuda.device_count()))
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("gpu", "hidden by CUDA_VISIBLE_DEVICES: everything runs on the CPU")
    elif any(Path("/dev").glob("nvidia[0-9]*")):
        remedy = "update the driver, or install the torch that fits it (nvidia-smi says which CUDA it has)"
        yield Finding("gpu", "there is one, and torch cannot use it", "look", remedy)
    else:
        yield Finding("gpu", "none: everything runs on the CPU")


def _gpu(index: int) -> Finding:
    """Try the GPU, since torch also lists GPUs that it has no kernels for."""
    import torch

    name = f"gpu {index}"
    try:
        facts = torch.cuda.get_device_properties(index)
        torch.ones(2, device=f"cuda:{index}").sum().item()
        free, whole = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "install the torch that fits it and its driver, or hide it: CUDA_VISIBLE_DEVICES= dimefm ..."
        return Finding(name, f"torch cannot use it: {reason}", "stops", remedy)
    others = free < _MOSTLY_FREE * whole
    remedy = (
        "others use it (nvidia-smi): choose another with CUDA_VISIBLE_DEVICES, or smaller batches" if others else ""
    )
    found = f"{facts.name}, {amount(whole)}, {amount(free)} free"
    return Finding(name, found, "look" if others else "ok", remedy)


def _faiss() -> Finding:
    return _tried("faiss", _faiss_facts, "build-index and retrieve --index need it: pip install faiss-cpu")


def _faiss_facts() -> str:
    from dimefm.retrieval.faiss_index import faiss_version, gpus

    return f"{faiss_version()}, {f'on {gpus()} GPUs' if gpus() else 'on the CPU'}"


def _ray() -> Finding:
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        remedy = "name a folder of your own with RAY_TMPDIR, or give --workers 1"
        return Finding("ray", f"it may not write to {there}", "look", remedy)
    return _tried("ray", lambda: f"{version('ray')}, in {folder}", "more than one worker needs it: pip install ray")


def _jpeg() -> Finding:
    remedy = "images are decoded several times slower: pip install simplejpeg"
    return _tried("jpeg", lambda: f"simplejpeg {version('simplejpeg')}: fast decoding", remedy)


def _tried(name: str, facts: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(name, facts())
    except (ImportError, OSError, PackageNotFoundError) as error:
        return Finding(name, f"cannot be used: {error}", "look", remedy)


def _defaults() -> list[tuple[str, str]]:
    from dimefm.models.clip import teacher_precision
    from dimefm.training.machine_settings import choose_loaders, choose_threads
    from dimefm.training.recipes import RECIPES

    device = machine.choose_device(None)
    sizes = ((name, recipe("", "", "")) for name, recipe in RECIPES.items())
    readers = ", ".join(
        f"{choose_loaders(None, device, config.batch_size * 3 * (config.image_size or 224) ** 2)[0]} ({name})"
        for name, config in sizes
    )
    return [
        ("device", device),
        ("teacher", f"{teacher_precision(device)}; at most {counted(machine.cpus(), 'worker')} on CPUs, one a GPU"),
        ("student", f"{machine.choose_precision(device)}, {choose_threads()} torch threads"),
        ("readers", f"loader processes of train-student by recipe: {readers}"),
        ("open files", f"{machine.open_files():,}, of which half may be maps of shards"),
    ]
