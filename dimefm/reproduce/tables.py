"""What a job comes to, as tables: how good its students are, what they cost, and how long each stage took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dimefm.evaluation.predictions import read_predictions
from dimefm.evaluation.results import read_results
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system.machine import cpus
from dimefm.training.read_metrics import read_metrics
from dimefm.training.run_folder import read_run

EVALUATIONS = "evaluations"


class JobTable(NamedTuple):
    """Rows of plain text, the first of which is the head; and what a reader must know of them."""

    title: str
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student that a job trains: its name in paths, its label in tables, and its recipe with further options of
    train-student. `grounded` draws its texts from the selection. `bars` is the top-1 that it must reach on a set, as a
    multiple of chance."""

    name: str
    label: str
    recipe: str
    grounded: bool = False
    options: tuple[str, ...] = ()
    bars: dict[str, float] = field(default_factory=dict)

    def run(self, out: Path) -> Path:
        """Its run folder, in the folder of the job."""
        return out / f"run-{self.name}"


@dataclass(frozen=True)
class SetScore:
    """Zero-shot of a model on a set, with the prediction for every image."""

    weights: str
    images: int
    classes: int
    top1: float
    top5: float
    predictions: list[int]

    @property
    def times_chance(self) -> float:
        return self.top1 * self.classes


def read_scores(out: Path, model: str) -> dict[str, SetScore]:
    """The zero-shot scores of a model, by set. A user may have measured more in its folder."""
    folder = str(out / EVALUATIONS / model)
    return {
        result.set: SetScore(
            weights=str(result.model["weights"]),
            images=result.images,
            classes=result.classes,
            top1=result.metrics["top1"],
            top5=result.metrics.get("top5", 1.0),
            predictions=read_predictions(folder, result),
        )
        for result in read_results(folder)
        if result.protocol == "zero-shot" and "top1" in result.metrics
    }


def accuracy_table(
    teacher: dict[str, SetScore], found: dict[str, dict[str, SetScore]], students: Sequence[Student]
) -> JobTable:
    """A row for the teacher and each student on each set."""
    rows = []
    for name, t in teacher.items():
        where = f"{name} ({t.images:,} images, {t.classes} classes)"
        rows.append((where, "teacher", f"{t.top1:.1%} / {t.top5:.1%}", "", f"{t.times_chance:.1f}", ""))
        for student in students:
            s = found[student.name][name]
            agree = sum(a == b != -1 for a, b in zip(t.predictions, s.predictions, strict=True)) / s.images
            bar = f" (bar {student.bars[name]})" if name in student.bars else ""
            rows.append(
                (
                    name,
                    student.label,
                    f"{s.top1:.1%} / {s.top5:.1%}",
                    f"{s.top1 / max(t.top1, 1e-9):.0%}",
                    f"{s.times_chance:.1f}{bar}",
                    f"{agree:.1%}",
                )
            )
    head = ("zero-shot", "model", "top-1 / top-5", "of teacher", "x chance", "as teacher says")
    return JobTable("Accuracy", [head, *rows])


def cost_table(out: Path, students: Sequence[Student], seconds: dict[str, float | None]) -> JobTable:
    """The cost of the teacher, once, and of each student after it; and what each would cost with the teacher in its
    training loop."""
    images, texts = Store(str(out / "images.zarr")), Store(str(out / "texts.zarr"))
    image_rate, text_rate = _rate(images), _rate(texts)
    once = _total([seconds.get(name) for name in ("cache-images", "cache-texts")])
    rows = [("teacher, once", _seconds(once), "", "")]
    online_of_all, cached_of_all = list[float | None](), [once]
    for student in students:
        config = read_run(str(student.run(out))).config
        steps = steps_of(out, student)
        seen, drawn = steps * int(str(config["batch_size"])), 0
        if config["loss"]["vl"]:  # type: ignore[index]
            drawn = steps * int(str(config["texts_per_step"]))
        spent = seconds.get(f"train {student.name}")
        online = None if spent is None else spent + seen / image_rate + drawn / text_rate
        online_of_all.append(online)
        cached_of_all.append(spent)
        times = f"{online / spent:,.0f} times" if spent and online else ""
        rows.append((f"student: {student.label}", _seconds(spent), _seconds(online), times))
    whole, without = _total(cached_of_all), _total(online_of_all)
    saving = f"{without / whole:.1f} times" if whole and without else ""
    rows.append((f"all {len(students) + 1} together", _seconds(whole), _seconds(without), saving))
    head = ("seconds of", "with the cache", "teacher in the loop", "saving")
    note = (
        f"In the loop the teacher would encode every image and sentence of each step again, at the {image_rate:,.0f} "
        f"images/s and {text_rate:,.0f} sentences/s that it had in stage 1 on all cores."
    )
    return JobTable("Cost", [head, *rows], [note])


def _total(seconds: Sequence[float | None]) -> float | None:
    """The sum; None if one is not known, as for a stage that was stopped and went on."""
    known = [one for one in seconds if one is not None]
    return sum(known) if len(known) == len(seconds) else None


def _seconds(spent: float | None) -> str:
    return "resumed" if spent is None else f"{spent:,.0f}"


def _rate(store: Store) -> float:
    """Rows per second of the teacher on this machine. The time of a shard is that of one worker; on a CPU there was one
    worker per core."""
    commits = list(store.commits())
    workers = cpus() if commits[0].device == "cpu" else 1
    return store.schema.rows / sum(commit.seconds for commit in commits) * workers


def steps_of(out: Path, student: Student) -> int:
    return int(max(line["step"] for line in read_metrics(str(student.run(out))) if line["event"] == "train"))


def stage_table(out: Path, students: Sequence[Student], seconds: dict[str, float | None]) -> JobTable:
    images, texts, prompts = (Store(str(out / n)) for n in ("images.zarr", "texts.zarr", "prompts.zarr"))
    evaluated = sum(score.images for score in read_scores(out, "teacher").values())
    counts: dict[str, tuple[int, str, float | None]] = {
        "cache-images": (images.schema.rows, "images", _bytes(out / "images.zarr") / images.schema.rows),
        "cache-texts": (texts.schema.rows, "texts", _bytes(out / "texts.zarr") / texts.schema.rows),
        "cache-prompts": (prompts.schema.rows, "prompts", _bytes(out / "prompts.zarr") / prompts.schema.rows),
        "build-index": (texts.schema.rows, "texts", _bytes(out / "texts.index") / texts.schema.rows),
        "retrieve": (images.schema.rows, "images", _bytes(out / "pairs.zarr") / images.schema.rows),
        "select-texts": (texts.schema.rows, "texts", None),
        "evaluate teacher": (evaluated, "images", None),
    }
    for student in students:
        batch = int(str(read_run(str(student.run(out))).config["batch_size"]))
        counts[f"train {student.name}"] = (steps_of(out, student) * batch, "images seen", None)
        counts[f"evaluate {student.name}"] = (evaluated, "images", None)
    rows = []
    for name, spent in seconds.items():
        count, unit, size = counts.get(name, (None, "", None))
        rows.append(
            (
                name,
                f"{spent:,.1f}" if spent else "resumed",
                f"{count:,} {unit}" if count else "",
                f"{count / spent:,.0f}/s" if count and spent else "",
                f"{size:,.0f}" if size else "",
            )
        )
    total = sum(spent or 0 for spent in seconds.values())
    hits = Pairs(str(out / "pairs.zarr")).hit_counts()
    notes = [
        f"all stages: {total / 60:.1f} minutes, with the start of each (but not the import of its libraries)",
        f"visually grounded: {hits.selected:,} of {hits.text_rows:,} sentences, by at least one image",
    ]
    return JobTable("Stages", [("stage", "seconds", "rows", "rate", "bytes/row on disk"), *rows], notes)


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
