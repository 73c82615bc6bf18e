"""`dimefm evaluate` against CLIP_benchmark: the same images, labels, prompts and weights, float32 on both sides."""

import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq

from benchmarks.clip_benchmark_worker import RETRIEVAL, Job, is_retrieval
from benchmarks.measure import machine, median, ratio, table
from benchmarks.training_pixels import enlarged
from cache_schemas.evaluation import PREDICTIONS, EvaluationResult
from dimefm.datasets.unused_files import CLIP_BENCHMARK_TEMPLATES
from dimefm.evaluation.predictions import PREDICTIONS_SUFFIX, file_name
from dimefm.evaluation.results import read_results
from dimefm.sources.base import split_key
from dimefm.sources.prompts import CLASSNAMES, TEMPLATES

_WORKER = str(Path(__file__).parent / "clip_benchmark_worker.py")
_THEIRS, _NAME = "CLIP_benchmark", "ours"
_CLASSES = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
_RETRIEVAL = [f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)]
_SAME = 1e-6  # of a share of images: below one image of any set, above what a mean in float32 loses


@dataclass(frozen=True)
class _Model:
    """By open_clip's name and tag."""

    name: str
    tag: str

    @classmethod
    def of(cls, text: str) -> "_Model":
        name, _, tag = text.partition(",")
        return cls(f"local-dir:{Path(name[10:]).resolve()}" if name.startswith("local-dir:") else name, tag)

    @property
    def short(self) -> str:
        return Path(self.name).name if self.name.startswith("local-dir:") else f"{self.name} {self.tag}"


@click.command()
@click.option("--python", required=True, help="The Python of an environment that has CLIP_benchmark: python -m venv "
              "ENV; ENV/bin/pip install clip_benchmark==1.6.2 requests 'numpy<2.4', and torch, torchvision, "
              "open_clip_torch, timm and pillow in the versions that are here.")  # fmt: skip
@click.option("--data", required=True, help="Folder of sets, each of tars with classnames.txt and templates.txt, or "
              "with captions.")  # fmt: skip
@click.option("--model", "models", multiple=True, required=True, help="local-dir:FOLDER or NAME,TAG; may be repeated.")
@click.option("--sets", help="Only these of them: A,B.")
@click.option("--decoder", "decoders", type=click.Choice(["pillow", "fast"]), multiple=True, default=("pillow",),
              show_default=True, help="Of dimefm; may be repeated. Only pillow has to agree.")  # fmt: skip
@click.option("--enlarge", default=1.0, show_default=True, help="Make the images larger first, as photographs are.")
@click.option("--repeat", default=1, show_default=True, help="Take each image so many times, as in a larger set.")
@click.option("--templates", type=int, help="Take only so many of a set's templates.")
@click.option("--rounds", default=3, show_default=True, help="Of timing, after the one that is compared; 0: none.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--workers", default=2, show_default=True, help="Its loading processes.")
def clip_benchmark(
    python: str,
    data: str,
    models: tuple[str, ...],
    sets: str | None,
    decoders: tuple[str, ...],
    enlarge: float,
    repeat: int,
    templates: int | None,
    rounds: int,
    batch_size: int,
    workers: int,
) -> None:
    """Counts of right answers of dimefm evaluate and CLIP_benchmark, and the seconds of both commands."""
    names = sets.split(",") if sets else sorted(path.name for path in Path(data).iterdir() if path.is_dir())
    worst, seconds = 0.0, list[tuple[str, ...]]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names:
            lay_out(Path(data, name), folder / "data" / name, workers, enlarge, repeat, templates)
        compared: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
        for model in map(_Model.of, models):
            job = Job(
                data=str(folder / "data"),
                sets=tuple(names),
                model=model.name,
                pretrained=model.tag,
                out=str(folder / "theirs"),
                batch_size=batch_size,
                workers=workers,
                keep=True,
            )
            _run_theirs(python, job)
            for decoder in decoders:
                _run_ours(job, decoder, folder / decoder, "--predictions")
                for result in read_results(str(folder / decoder / _NAME)):
                    found = _compare(result, job, folder / decoder / _NAME)
                    worst = max(worst, found.worst if decoder == "pillow" else 0.0)
                    line = (result.set, model.short, decoder, f"{result.images:,}", *found.cells)
                    compared[result.metric.startswith("mean_recall")].append(line)
            if rounds:
                took = _time(python, job, decoders, folder, rounds)
                seconds += [
                    (model.short, name, f"{median(times):.1f}", f"{min(times):.1f}-{max(times):.1f}",
                     f"{ratio(took[_THEIRS], times):.2f}")
                    for name, times in took.items()
                ]  # fmt: skip
    if compared[False]:
        head = ("set", "model", "decoder", "images", "top-1", "top-5", "mean per class", "difference", "others", "gap")
        click.echo(table(head, compared[False]) + "\n")
    if compared[True]:
        ways = (f"{way} R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10))
        click.echo(table(("set", "model", "decoder", "images", *ways, "difference"), compared[True]) + "\n")
    if rounds:
        click.echo(table(("model", "command", "seconds", "lowest-highest", "as fast"), seconds) + "\n")
    click.echo("dimefm / CLIP_benchmark, and the largest difference; others: images whose first class is another one,")
    click.echo("and the gap between the first two cosines of those, at most")
    facts = f"float32, batches of {batch_size}, {workers} loading processes of CLIP_benchmark"
    facts += f", images {enlarge:g} times as large" * (enlarge != 1) + f", each {repeat} times" * (repeat > 1)
    facts += f", {templates} of the templates" if templates else ""
    click.echo(f"{machine()}; {facts}; {_versions(python)}")
    if rounds:
        click.echo(f"medians of {rounds} paired rounds; all sets in one fresh process, no embeddings kept from before")
    if worst > _SAME:
        raise click.ClickException(f"a difference of {worst:.1e}")


def lay_out(
    source: Path, target: Path, shards: int, enlarge: float = 1.0, repeat: int = 1, templates: int | None = None
) -> None:
    """A copy of a set in CLIP_benchmark's layout, of larger or more images, or fewer templates, if asked for. Each of
    its loading processes wants a tar."""
    test = target / "test"
    test.mkdir(parents=True)
    if (source / CLASSNAMES).exists():
        shutil.copyfile(source / CLASSNAMES, target / CLASSNAMES)
        lines = (source / TEMPLATES).read_text().splitlines(keepends=True)
        (target / CLIP_BENCHMARK_TEMPLATES).write_text("".join(lines[:templates]))
    else:
        (target / "dataset_type.txt").write_text(RETRIEVAL)
    samples = [sample for tar in sorted(source.glob("*.tar")) for sample in _samples(tar)]
    if enlarge != 1:
        for sample in samples:
            sample[:] = [(name, enlarged(data, enlarge) if name.endswith(".jpg") else data) for name, data in sample]
    samples = [
        [(f"{turn}-{name}", content) for name, content in sample] for turn in range(repeat) for sample in samples
    ]
    (test / "nshards.txt").write_text(str(shards))
    for shard in range(shards):
        start, stop = (len(samples) * place // shards for place in (shard, shard + 1))
        with tarfile.open(test / f"{shard}.tar", "w") as tar:
            for name, content in itertools.chain.from_iterable(samples[start:stop]):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _samples(path: Path) -> list[list[tuple[str, bytes]]]:
    """The members of a tar, name and content, by their sample."""
    with tarfile.open(path) as tar:
        members = [(member.name, file.read()) for member in tar if (file := tar.extractfile(member))]
    return [list(group) for _, group in itertools.groupby(members, lambda one: split_key(one[0])[0])]


def _run_theirs(python: str, job: Job) -> float:
    shutil.rmtree(job.out, ignore_errors=True)
    Path(job.out).mkdir()
    return _seconds([python, _WORKER, job.to_json()])


def _run_ours(job: Job, decoder: str, out: Path, *options: str) -> float:
    shutil.rmtree(out, ignore_errors=True)
    words = ["evaluate", job.model, *(f"{job.data}/{name}" for name in job.sets), "--out", str(out), "--name", _NAME]
    words += ["--decoder", decoder, "--batch-size", str(job.batch_size), *options]
    words += ["--pretrained", job.pretrained] if job.pretrained else []
    return _seconds([sys.executable, "-m", "dimefm", *words])


def _seconds(words: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def _time(python: str, job: Job, decoders: tuple[str, ...], folder: Path, rounds: int) -> dict[str, list[float]]:
    bare = Job(**{**vars(job), "keep": False})
    calls = {_THEIRS: lambda: _run_theirs(python, bare)}
    for decoder in decoders:
        calls[f"dimefm, {decoder}"] = lambda decoder=decoder: _run_ours(job, decoder, folder / decoder)  # type: ignore[misc]
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in list(calls.items())[:: 1 - 2 * (turn % 2)]:
            took[name].append(call())
            click.echo(f"round {turn + 1}: {name}, {took[name][-1]:.1f} s", err=True)
    return took


@dataclass(frozen=True)
class _Found:
    cells: tuple[str, ...]
    worst: float


def _compare(result: EvaluationResult, job: Job, folder: Path) -> _Found:
    theirs = json.loads(Path(job.out, f"{result.set}.json").read_text())["metrics"]
    retrieval = is_retrieval(Path(job.data, result.set))
    cells, differences = [], []
    named = dict(zip(_RETRIEVAL, _RETRIEVAL, strict=True)) if retrieval else _CLASSES
    for mine, their in named.items():
        pair = (result.metrics[mine], theirs[their])
        differences.append(abs(pair[0] - pair[1]))
        cells.append(" / ".join(f"{value:.4f}" for value in pair))
    cells.append(f"{max(differences):.0e}" if max(differences) else "0")
    if not retrieval:
        cells += _other_predictions(result, Path(job.out, f"{result.set}.npz"), folder)
    return _Found(tuple(cells), max(differences))


def _other_predictions(result: EvaluationResult, theirs: Path, folder: Path) -> tuple[str, str]:
    """How many images have another first class, and how far apart CLIP_benchmark's first two of those are at most."""
    path = folder / PREDICTIONS / (file_name(result.title, result.protocol) + PREDICTIONS_SUFFIX)
    ours: Any = pq.read_table(path, columns=["key", "prediction"]).to_pydict()
    there = dict(zip(ours["key"], ours["prediction"], strict=True))
    with np.load(theirs) as kept:
        keys, scores_NC = kept["keys"].tolist(), kept["scores"]
    other_N = np.array([there[key] for key in keys]) != scores_NC.argmax(axis=1)
    if not other_N.any():
        return "0", ""
    best_N2 = np.sort(scores_NC[other_N], axis=1)[:, -2:]
    return str(int(other_N.sum())), f"{np.diff(best_N2).max() / 100:.1e}"  # its logits are 100 times the cosines


def _versions(python: str) -> str:
    names = ("clip_benchmark", "webdataset", "torch", "open_clip_torch", "timm", "pillow")
    code = f"from importlib.metadata import version\nprint(', '.join(f'{{n}} {{version(n)}}' for n in {names}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
