"""The ten commands that chaos strikes, on a small part of the shipped sample, and what must be the same afterwards."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimefm.sample import sample_dir
from dimefm.system import storage

IMAGES, SENTENCES, LABELLED = 96, 1000, 60
_SHARD = 24  # images; four shards, of which some are done when a fault comes
_TIMES = {
    "seconds", "finished", "checksum", "images_per_second", "data_wait", "queries_per_second", "created", "written",
    "date", "at", "store", "out", "path", "crc32c",
}  # fmt: skip
"""Of JSON documents: what is of the run, not of its result."""


@dataclass(frozen=True)
class Job:
    """A command that writes `out`, below the folder of a round, from `inputs` and what the jobs `needs` have written.
    `{in}`, `{ref}` and `{out}` in its words stand for the folders of inputs, undisturbed results and this round."""

    name: str
    words: str
    out: str
    needs: tuple[str, ...] = ()
    share: int = 2


_TEACHER = f"--teacher local-dir:{sample_dir() / 'teacher'}"
_IMAGES = f"cache-images {{in}}/images {_TEACHER} --shard-rows {_SHARD} --batch-size 12 --device cpu --pixels 64"
_TRAINING = (
    "train-student --images {ref}/images.zarr --texts {ref}/texts.zarr --pairs {ref}/pairs.zarr --out {out}/run "
    "--recipe sample --text-mix random=0.5,retrieved=0.5 --student resnet18 --image-size 32 --batch-size 16 --epochs 2 "
    "--texts-per-step 64 --loss vl=0.7,pvl=0.3 --checkpoint-every 2 --log-every 1 --device cpu --precision fp32 "
    "--threads 1 --val {in}/eval --val-texts {ref}/prompts.zarr"
)
JOBS = (
    Job("cache-images", f"{_IMAGES} --workers 1 --threads 2 --out {{out}}/images.zarr", "images.zarr", share=5),
    Job("cache-images on Ray", f"{_IMAGES} --workers 2 --threads 1 --out {{out}}/images.zarr", "images.zarr", share=1),
    Job("cache-texts", f"cache-texts {{in}}/texts.txt {_TEACHER} --shard-rows 256 --workers 1 --device cpu "
        "--out {out}/texts.zarr", "texts.zarr", share=3),
    Job("cache-texts of prompts", f"cache-texts {{in}}/eval {_TEACHER} --workers 1 --device cpu "
        "--out {out}/prompts.zarr", "prompts.zarr", share=1),
    Job("build-index", "build-index {ref}/texts.zarr --out {out}/texts.index --queries {ref}/images.zarr --accept",
        "texts.index", ("images.zarr", "texts.zarr")),
    Job("retrieve", "retrieve {ref}/images.zarr --texts {ref}/texts.zarr --index {ref}/texts.index --top-k 8 "
        "--out {out}/pairs.zarr", "pairs.zarr", ("images.zarr", "texts.zarr", "texts.index")),
    Job("select-texts", "select-texts {ref}/pairs.zarr --out {out}/texts.selection --by similarity --size 400 "
        "--device cpu", "texts.selection", ("images.zarr", "texts.zarr", "pairs.zarr")),
    Job("train-student", _TRAINING, "run", ("images.zarr", "texts.zarr", "pairs.zarr", "prompts.zarr"), share=5),
    Job("export", "export {ref}/run --out {out}/student", "student", ("run",), share=1),
    Job("evaluate", "evaluate {ref}/student {in}/eval --predictions --out {out}/evaluations --name student --threads 2 "
        "--device cpu", "evaluations", ("student",), share=3),
    Job("export-embeddings", "export-embeddings {ref}/images.zarr --out {out}/embeddings", "embeddings",
        ("images.zarr",), share=1),
    Job("import-embeddings", f"import-embeddings {{ref}}/embeddings --kind image {_TEACHER} --images {{in}}/images "
        "--out {out}/imported.zarr", "imported.zarr", ("embeddings",), share=1),
)  # fmt: skip


def make_inputs(folder: Path, *, images: int = IMAGES, sentences: int = SENTENCES, labelled: int = LABELLED) -> None:
    """Two tars of images, a file of sentences and a labelled set, from the sample."""
    sample = sample_dir()
    (folder / "images").mkdir(parents=True)
    with tarfile.open(sample / "images" / "train-00005.tar") as source:
        members = [member for member in source if member.isfile() and member.name.endswith(".jpg")][:images]
        for number in range(2):
            with tarfile.open(folder / "images" / f"{number}.tar", "w") as tar:
                for member in members[number::2]:
                    tar.addfile(member, source.extractfile(member))
    import gzip

    with gzip.open(sample / "texts" / "visual_gcc_validation.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(sentences), strict=False)]
    (folder / "texts.txt").write_text("".join(lines), encoding="utf-8")
    shutil.copytree(sample / "eval" / "cifar10", folder / "eval", ignore=shutil.ignore_patterns("*.tar"))
    with tarfile.open(sample / "eval" / "cifar10" / "test-00000.tar") as source:
        members = [member for member in source if member.isfile()][: 2 * labelled]
        with tarfile.open(folder / "eval" / "test-00000.tar", "w") as tar:
            for member in members:
                tar.addfile(member, source.extractfile(member))


def facts(path: Path) -> dict[str, str]:
    """What a result consists of, by file: digests of the bytes; of JSON those of what is not of the run alone; of
    checkpoints those of their tensors."""
    return {name: _digest(path / name) for name in sorted(storage.tree(str(path))) if _reader(name)}


def _reader(name: str) -> Callable[[Path], object] | None:
    last = name.rpartition("/")[2]
    if last.startswith("events.out.tfevents"):
        return None
    suffix = last.rpartition(".")[2]
    return {"json": _json, "jsonl": _json, "pt": _tensors}.get(suffix, Path.read_bytes)


def _digest(path: Path) -> str:
    reader = _reader(path.name)
    assert reader
    value = reader(path)
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def _json(path: Path) -> object:
    return [_lasting(json.loads(line)) for line in ([path.read_text()] if path.suffix == ".json" else path.open())]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(child) for key, child in sorted(value.items()) if key not in _TIMES}
    return [_lasting(child) for child in value] if isinstance(value, list) else value


def _tensors(path: Path) -> object:
    import torch

    def leaves(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: leaves(child) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [leaves(child) for child in value]
        if isinstance(value, torch.Tensor):
            return hashlib.sha256(value.reshape(-1).clone().view(torch.uint8).numpy().tobytes()).hexdigest()
        return value

    return leaves(torch.load(path, map_location="cpu", weights_only=True))
