"""Which way of selecting sentences finds those that are about images, and whether students are the better for it."""

import dataclasses
import statistics
import time
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.measure import machine, table
from benchmarks.small_student import resnet10
from cache_schemas import Status
from dimefm.selection.clusters import cluster
from dimefm.selection.grounding import score_by_grounding
from dimefm.selection.report import source_file
from dimefm.selection.select_texts import SelectionConfig, best_cosines, select_texts
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.training.config import LossConfig, TextMix
from dimefm.training.train import train

_KINDS = ("visual", "mixed", "nonvisual")  # how the names of the source files begin
_BLOCK = 1024


def methods(size: int) -> dict[str, dict[str, object]]:
    """What is compared, by name: settings of a SelectionConfig."""
    return {
        "random": {"by": "random"},
        "all visual": {"by": "random"},
        "hits": {"by": "hits"},
        "hits, balanced": {"by": "hits", "balance": True},
        "similarity": {"by": "similarity"},
        "similarity, dedup 0.995": {"by": "similarity", "dedup": 0.995, "pool": 3 * size},
        "similarity, balanced": {"by": "similarity", "balance": True, "pool": 3 * size},
    }


@click.command()
@click.option("--images", required=True, help="Image store.")
@click.option("--texts", required=True, help="Text store, of files that are named visual_*, mixed_* and nonvisual_*.")
@click.option("--pairs", required=True, help="Pseudo-text store over them.")
@click.option("--out", default="runs/selection", show_default=True)
@click.option("--size", default=25_000, show_default=True, help="Sentences of every selection.")
@click.option("--images-sample", default=16_384, show_default=True)
@click.option("--students", is_flag=True, help="Train students on every selection.")
@click.option("--val", multiple=True, help="Labelled set; may be repeated.")
@click.option("--val-texts", help="Text store with their prompts.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=2.5, show_default=True)
@click.option("--max-steps", type=int)
@click.option("--only", multiple=True, help="Students of selections whose name contains this.")
def selection(
    images: str, texts: str, pairs: str, out: str, size: int, images_sample: int, students: bool, val: tuple[str, ...],
    val_texts: str | None, seeds: int, epochs: float, max_steps: int | None, only: tuple[str, ...],
) -> None:  # fmt: skip
    """Selections of sentences at the same size: precision, AUC of the scores, students.

    Precision: the share of visual_* among kept visual_* and nonvisual_* sentences. AUC: of a score as a classifier of
    the two, over the whole store. Students: the sample recipe with the paper's losses, all texts from the selection.
    """
    if students and not (val and val_texts):
        raise click.UsageError("--students needs --val and --val-texts")
    if not students and (val or val_texts or only or max_steps):
        raise click.UsageError("--val, --val-texts, --only and --max-steps have no effect without --students")
    store, folder = Store(texts), Path(out)
    kind_T = kinds(store)
    chosen = {}
    for number, (name, words) in enumerate(methods(size).items()):
        path = folder / f"{number}-{name.replace(',', '').replace(' ', '-')}.selection"
        if words["by"] == "similarity":
            words |= {"images": images, "images_sample": images_sample}
            words |= {"scores": chosen["similarity"].path} if "similarity" in chosen else {}
        config = SelectionConfig(pairs=pairs, texts=texts, out=str(path), size=size, **words)  # type: ignore[arg-type]
        select_texts(config, np.flatnonzero(kind_T == "visual") if name == "all visual" else None)
        chosen[name] = SelectedTexts(str(path))
    click.echo(_precision(store, kind_T, chosen, folder))
    click.echo(_aucs(Store(images), store, Pairs(pairs), kind_T, folder, images_sample))
    click.echo(f"{machine()}; {store.schema.rows:,} sentences, {Store(images).schema.rows:,} images")
    if students:
        wanted = {n: s for n, s in chosen.items() if not only or any(part in n for part in only)}
        _students(wanted, images, texts, folder, val, str(val_texts), seeds, epochs, max_steps)


def kinds(store: Store) -> np.ndarray:
    """By sentence, how the name of its source file begins: visual, mixed or nonvisual."""
    found = [
        source_file(key).partition("_")[0]
        for s in range(store.schema.shards)
        for key in store.plan(s)["key"].to_pylist()
    ]
    strangers = set(found) - set(_KINDS)
    if strangers:
        raise click.UsageError(f"sentences are of files named {min(strangers)}..., not of {', '.join(_KINDS)}")
    return np.array(found)


def auc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, equals counted as a half."""
    _, place_N, count = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2)[place_N]
    positives = int(positive_N.sum())
    above = float(rank_N[positive_N].sum()) - positives * (positives + 1) / 2
    return above / (positives * (len(score_N) - positives))


def _precision(store: Store, kind_T: np.ndarray, chosen: dict[str, SelectedTexts], folder: Path) -> str:
    label_T = _labels(store, folder)
    head = ("selection", "kept", *_KINDS, "precision", "clusters", "largest cluster")
    rows = []
    everything = np.flatnonzero(label_T >= 0)
    for name, kept in {"(the whole store)": everything, **{n: s.rows() for n, s in chosen.items()}}.items():
        share = {kind: float((kind_T[kept] == kind).mean()) for kind in _KINDS}
        precision = share["visual"] / (share["visual"] + share["nonvisual"])
        counts = np.bincount(label_T[kept])
        shares = [f"{share[kind]:.1%}" for kind in _KINDS]
        coverage = (f"{(counts > 0).sum():,} of {label_T.max() + 1:,}", f"{counts.max() / len(kept):.1%}")
        rows.append((name, f"{len(kept):,}", *shares, f"{precision:.1%}", *coverage))
    return table(head, rows)


def _labels(store: Store, folder: Path) -> np.ndarray:
    """The cluster of each sentence among all of the store, -1 without an embedding; kept for the next call."""
    path = folder / "clusters.npy"
    if path.exists():
        return np.load(path)
    rows = np.concatenate([store.valid_rows(*store.schema.shard_range(s))[0] for s in range(store.schema.shards)])
    label_T = np.full(store.schema.rows, -1, np.int32)
    label_T[rows] = cluster(store, rows, str(folder / "clusters"), seed=0, device="cpu")
    np.save(path, label_T)
    return label_T


def _aucs(images: Store, texts: Store, pairs: Pairs, kind_T: np.ndarray, folder: Path, count: int) -> str:
    """The AUC of every score, this one's formula among them."""
    scores = _plain_scores(images, texts, folder / f"scores-{count}.npz", count)
    cosine_T = best_cosines(pairs)
    top_k = pairs.schema.top_k
    scores[f"hits, top {top_k}"] = pairs.hits()
    scores[f"best cosine of those in a top {top_k}, others lowest"] = np.where(np.isnan(cosine_T), -2, cosine_T)
    found = score_by_grounding(
        images, texts, str(folder / "4-similarity.selection"), count=count, seed=0, device="cpu"
    )  # fmt: skip
    scores["select-texts --by similarity"] = found
    judged_T = (kind_T != "mixed") & ~np.isnan(found)
    rows = [(name, f"{auc(s[judged_T], kind_T[judged_T] == 'visual'):.3f}") for name, s in scores.items()]
    return table(("score", "AUC, visual against nonvisual"), rows)


def _plain_scores(images: Store, texts: Store, path: Path, count: int) -> dict[str, np.ndarray]:
    """Other scores of every sentence, from the same number of images; kept for the next call."""
    if path.exists():
        return dict(np.load(path))
    rows = np.flatnonzero(images.status() == Status.OK)
    drawn = np.sort(np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False))
    image_MD = torch.from_numpy(images.gather(drawn)).float()
    some = np.flatnonzero(texts.status() == Status.OK)
    drawn = np.sort(np.random.default_rng(1).choice(some, min(16_384, len(some)), replace=False))
    mean_D = torch.from_numpy(texts.gather(drawn)).float().mean(dim=0)
    image_mean_D = image_MD.mean(dim=0)
    centred_MD = torch.nn.functional.normalize(image_MD - image_mean_D, dim=1)
    names = ("maximum", "mean of the top 16", "maximum - mean", "(maximum - mean) / deviation", "centred maximum",
             "cosine to the mean sentence (no image)")  # fmt: skip
    found = {name: np.full(texts.schema.rows, np.nan, np.float32) for name in names}
    for shard in range(texts.schema.shards):
        rows, embedding_ND = texts.valid_rows(*texts.schema.shard_range(shard))
        for at in range(0, len(rows), _BLOCK):
            text_ND = torch.from_numpy(embedding_ND[at : at + _BLOCK]).float()
            similarity_NM = text_ND @ image_MD.T
            top = similarity_NM.topk(min(16, len(image_MD)), dim=1).values
            deviation, mean = torch.std_mean(similarity_NM, dim=1)
            centred = torch.nn.functional.normalize(text_ND - mean_D, dim=1) @ centred_MD.T
            values = (top[:, 0], top.mean(dim=1), top[:, 0] - mean, (top[:, 0] - mean) / deviation,
                      centred.amax(dim=1), text_ND @ mean_D)  # fmt: skip
            for name, value in zip(names, values, strict=True):
                found[name][rows[at : at + _BLOCK]] = value.numpy()
    np.savez(path, **found)
    return found


def _students(
    chosen: dict[str, SelectedTexts], images: str, texts: str, folder: Path, val: tuple[str, ...], val_texts: str,
    seeds: int, epochs: float, max_steps: int | None,
) -> None:  # fmt: skip
    """Students of all selections, a seed at a time, so that the table is complete after each."""
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for seed in range(seeds):
        for name, selected in chosen.items():
            began = time.monotonic()
            config = dataclasses.replace(
                resnet10(
                    images, texts, str(folder / f"student-{Path(selected.path).stem}-{epochs:g}-{max_steps}-{seed}")
                ),
                loss=LossConfig(vl=0.7, pvl=0.3),
                selection=selected.path,
                text_mix=TextMix(random=0, selected=1),
                epochs=epochs,
                warmup_epochs=epochs / 20,
                max_steps=max_steps,
                val=val,
                val_texts=val_texts,
                val_every=epochs,
                seed=seed,
            )
            scores[name].append(train(config).validation)
            seconds[name].append(time.monotonic() - began)
            click.echo(f"seed {seed}, {name}: {scores[name][-1]} in {seconds[name][-1]:.0f} s", err=True)
        sets = list(scores[name][0])
        first = next(iter(scores))
        rows = []
        for name, found in scores.items():
            means = [statistics.mean(f.values()) for f in found]
            base = [statistics.mean(f.values()) for f in scores[first]]
            cells = [_spread([f[s] for f in found]) for s in sets]
            gain = _spread([a - b for a, b in zip(means, base, strict=True)]) if name != first else ""
            rows.append((name, *cells, _spread(means), gain, f"{statistics.mean(seconds[name]):.0f}"))
        head = ("texts", *(f"{s} top-1" for s in sets), "mean", f"mean - {first}, by seed", "seconds")
        click.echo(table(head, rows))
    click.echo(f"{machine()}; ResNet-10-T at 64 px, 0.7 vl + 0.3 pvl, {epochs:g} epochs, seeds 0-{seeds - 1}")


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
