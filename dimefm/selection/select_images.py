"""`select-images`: which images of a store are worth training on, judged by their embeddings.

Shapes: T images of the store, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_schemas import Status
from cache_schemas.image_selection import (
    DROPPED_FILE,
    UNWANTED,
    ImageRanking,
    ImageSelection,
    ImageSelectionPlan,
    ImageSelectionSettings,
)
from cache_schemas.text_selection import (
    CLUSTERS,
    PLAN_FILE,
    REPORT_FILE,
    ROWS_FILE,
    SCORES,
    SELECTION_FILE,
)
from dimefm.errors import SelectionError
from dimefm.selection.image_plan import begin_or_continue, remove_begun
from dimefm.selection.image_report import REASONS, markdown_report, score_histogram, write_copies, write_kept_images
from dimefm.selection.narrow import Limits, Narrowed, Outcome, narrow
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.output_folder import in_lines
from dimefm.store.selected_images import SelectedImages
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.lock import writing
from dimefm.system.machine import choose_device
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.shard_work import ShardRunner, run_here
from dimefm.system.wording import counted

NEAR_SAMPLE = 16384
_PASSES = 2  # of clusters: see benchmarks/planted_copies.py
_OURS = {PLAN_FILE, SCORES, UNWANTED, CLUSTERS, ROWS_FILE, DROPPED_FILE, REPORT_FILE, SELECTION_FILE}
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class ImageSelectionConfig:
    """How to select images, and from what.

    The images are ranked, `by`
      central     how near each is to the middle of its cluster: of images that are alike, the most typical is kept;
      distant     the reverse: the least typical is kept;
      near        the mean cosine of an image with the 16 targets nearest to it;
      random      a random draw.
    Then these apply, each if it is given, and in this order: `exact`, `drop_near`, `top`, `dedup`, `balance`, `size`.

    Raises SelectionError for settings without effect.
    """

    images: str
    """Image store to select from."""
    out: str
    """Selection to write, such as IMAGES.selection."""
    by: ImageRanking | None = None
    """How images are ranked: by how near they are to the middle of their cluster, or how far from it, by `near`, or at
    random. Default: near if `near` is given, else central."""
    near: str | None = None
    """Store of targets, of images or sentences of the same teacher: images near to them rank first."""
    near_sample: int | None = None
    """Number of random targets that images are compared with. Default: 16,384."""
    drop_near: tuple[str, ...] = ()
    """Leave out images that are near to this sentence, such as "a screenshot of a web page"."""
    drop_above: float | None = None
    """Cosine from which on an image is near to a sentence of `drop_near`."""
    exact: bool = False
    """Of images whose files are equal to the last byte, keep one."""
    top: int | None = None
    """Only this many best images go on to `dedup` and `balance`."""
    dedup: float | None = None
    """Leave out an image whose cosine to a better one, kept itself, is this or more."""
    balance: bool = False
    """Set the same cap on every cluster of similar images: the smallest that fills `size`."""
    size: int | None = None
    """Keep this many of the best images."""
    seed: int | None = None
    """Seed of the random ranking, the samples and the clusters. Default: 0."""
    device: str | None = None
    """Where similarities are computed. Default: cuda if there is a GPU, else cpu."""

    def __post_init__(self) -> None:
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value not in (None, ())}
        wrong = [f"{n} must be 1 or more, found {given[n]}" for n in ("--size", "--top", "--near-sample")
                 if given.get(n, 1) < 1]  # fmt: skip
        if self.dedup is not None and not 0 < self.dedup < 1:
            wrong.append(f"--dedup must lie between 0 and 1, found {self.dedup}")
        needs = {
            "--near": ("--by near", self.ranking == "near"),
            "--near-sample": ("--near", self.near is not None),
            "--drop-above": ("--drop-near", bool(self.drop_near)),
            "--top": ("--dedup or --balance", self.dedup is not None or self.balance),
        }
        wrong += [
            f"{n} has no effect without {other}" for n, (other, there) in needs.items() if n in given and not there
        ]
        if self.by == "near" and self.near is None:
            wrong.append("--by near needs --near, the store of targets")
        if self.drop_near and self.drop_above is None:
            wrong.append("--drop-near needs --drop-above, a cosine; dimefm search shows those of the nearest images")
        if self.drop_above is not None and not -1 < self.drop_above < 1:
            wrong.append(f"--drop-above must lie between -1 and 1, found {self.drop_above}")
        if not (self.exact or self.drop_near or self.dedup is not None or self.size is not None):
            wrong.append("nothing says what to leave out: give --exact, --dedup, --drop-near or --size")
        if self.balance and self.size is None:
            wrong.append("--balance has no effect without --size")
        if self.balance and self.top is not None and self.size is not None and self.top <= self.size:
            wrong.append(f"--balance has no effect: a --top of {self.top} leaves --size {self.size} no choice")
        if wrong:
            raise SelectionError("; ".join(wrong), remedy="change the named options")

    @property
    def ranking(self) -> ImageRanking:
        """`by`, with its default."""
        return self.by or ("near" if self.near else "central")


def select_images(
    config: ImageSelectionConfig,
    encode: Callable[[Sequence[str]], _Array] | None = None,
    run: ShardRunner = run_here,
) -> ImageSelection:
    """Select images into the folder `config.out`. `encode` gives the teacher's embeddings of the sentences of
    `drop_near`, (Q, D); `run` scores, clusters and compares: here, or many shards at a time (pipeline.ray_shards).

    A run that was stopped goes on: scores, clusters and repetitions that were finished are kept. Where the selection is
    finished, nothing is done. On one kind of device the same call writes the same bytes. Raises OutputExistsError where
    `out` is something else or was made with other settings, MismatchError where the targets are of another teacher,
    StoreError where a store is unfinished, SelectionError where no image is left.
    """
    require_name(config.out, "a selection", ".selection")
    out = storage.absolute(config.out)
    images = Store(config.images)
    images.require_kind("image")
    images.require_complete()
    targets = Store(config.near) if config.near else None
    if targets:
        targets.require_complete()
        require_same_teacher(images, targets)
    plan = ImageSelectionPlan(
        images=images.path,
        images_identity=images.schema.identity,
        images_data=images.contents.digest,
        settings=_settings(config, targets),
    )
    with writing(out, of_use=lambda files: files - {PLAN_FILE}):
        begin_or_continue(out, plan, _OURS, "select-images")
        if storage.exists(storage.join(out, SELECTION_FILE)):
            return SelectedImages(out).document
        storage.remove_leftovers(out)
        note(f"{counted(images.schema.rows, 'image')}: loading torch ...")
        device = choose_device(config.device)
        if config.drop_near:
            _keep_queries(config.drop_near, encode, out)
        try:
            return _select(plan, images, targets, out, device, run)
        except SelectionError:
            remove_begun(out, _OURS)
            raise


def _select(
    plan: ImageSelectionPlan, images: Store, targets: Store | None, out: str, device: str,
    run: ShardRunner,
) -> ImageSelection:  # fmt: skip
    settings = plan.settings
    assert settings is not None
    score_T = _scores(settings, images, targets, out, device, run)
    outcome_T = np.where(np.isnan(score_T), Outcome.NO_EMBEDDING, Outcome.KEPT).astype(np.uint8)
    order_C = _ranked(settings, np.flatnonzero(outcome_T == Outcome.KEPT), score_T)
    copies = (order_C[:0], order_C[:0])
    if settings.exact:
        from dimefm.selection.exact_copies import exact_copies

        copies = exact_copies(images, order_C)
        outcome_T[copies[0]] = Outcome.COPY
    if settings.drop_near:
        from dimefm.selection.image_scores import score_by_vectors

        near_T = score_by_vectors(images, storage.join(out, UNWANTED), device=device, run=run)
        outcome_T[(outcome_T == Outcome.KEPT) & (near_T >= settings.drop_above)] = Outcome.UNWANTED
    order_C = order_C[outcome_T[order_C] == Outcome.KEPT]
    limits = Limits(settings.top, settings.dedup, settings.balance, settings.size, settings.seed, _PASSES)
    folder = storage.join(out, CLUSTERS)
    found = narrow(limits, images, order_C, outcome_T, folder=folder, device=device, run=run)
    return finish_selection(out, plan, images, outcome_T, score_T, copies, found)


def finish_selection(
    out: str, plan: ImageSelectionPlan, images: Store, outcome_T: _Array, score_T: _Array,
    copies: tuple[_Array, _Array], found: Narrowed,
) -> ImageSelection:  # fmt: skip
    """Write what a selection leaves for its readers, selection.json last. Raises SelectionError where no image is left,
    StoreError where it cannot be written."""
    counts = np.bincount(outcome_T, minlength=len(Outcome)).tolist()
    dropped = {REASONS[outcome]: counts[outcome] for outcome in REASONS if counts[outcome]}
    if not counts[Outcome.KEPT]:
        why = in_lines(f"{count:,}: {reason}" for reason, count in dropped.items())
        raise SelectionError(f"no image is left:{why}", remedy="loosen these conditions")
    sources, digest = write_kept_images(out, images, outcome_T, score_T)
    groups, copies_digest = write_copies(out, outcome_T, copies, found.repeated)
    selection = ImageSelection(
        plan=plan,
        rows=images.schema.rows,
        kept=counts[Outcome.KEPT],
        dropped=dropped,
        groups=groups,
        clusters=found.clusters,
        cap=found.cap,
        sources=sources,
        histogram=score_histogram(plan.settings, outcome_T, score_T),
        digest=digest,
        copies_digest=copies_digest,
    )
    with storage.writing_to(out):
        storage.write_atomic(storage.join(out, REPORT_FILE), markdown_report(selection).encode())
        storage.remove_folder(storage.join(out, CLUSTERS))
        require_held(out)
        storage.write_json(storage.join(out, SELECTION_FILE), selection.to_json())
    return selection


def _settings(config: ImageSelectionConfig, targets: Store | None) -> ImageSelectionSettings:
    """What decides the result, with the defaults filled in."""
    return ImageSelectionSettings(
        by=config.ranking,
        near=targets.schema.identity if targets else None,
        near_data=targets.contents.digest if targets else None,
        near_sample=(config.near_sample or NEAR_SAMPLE) if targets else None,
        drop_near=config.drop_near,
        drop_above=config.drop_above,
        exact=config.exact,
        top=config.top,
        dedup=config.dedup,
        balance=config.balance,
        size=config.size,
        seed=config.seed or 0,
    )


def _keep_queries(sentences: tuple[str, ...], encode: Callable[[Sequence[str]], _Array] | None, out: str) -> None:
    """Encode `drop_near`, unless a run that was stopped has: before anything is scored, so that a teacher that is gone
    is an error at once."""
    from dimefm.selection.image_scores import keep_vectors  # imports torch

    if encode is None:
        raise ValueError("drop_near needs encode")
    keep_vectors(storage.join(out, UNWANTED), lambda: encode(sentences))


def _scores(
    settings: ImageSelectionSettings, images: Store, targets: Store | None, out: str, device: str, run: ShardRunner
) -> _Array:
    """What ranks each image, float32 (T,), NaN without an embedding; at random 0."""
    if settings.by == "random":
        score_T = np.full(images.schema.rows, np.nan, np.float32)
        for shard in range(images.schema.shards):
            rows_N, _ = images.valid_rows(*images.schema.shard_range(shard))
            score_T[rows_N] = 0
        return score_T
    folder = storage.join(out, SCORES)
    if not (images.status() == Status.OK).any():
        raise SelectionError(f"{images.path} has no image with an embedding", remedy="see dimefm info for what failed")
    if targets is not None:
        from dimefm.selection.image_scores import closeness  # imports torch

        count = settings.near_sample or NEAR_SAMPLE
        return closeness(images, folder, targets, count, seed=settings.seed, device=device, run=run)
    from dimefm.selection.image_scores import centrality

    return centrality(images, folder, seed=settings.seed, device=device, run=run)


def _ranked(settings: ImageSelectionSettings, rows_C: _Array, score_T: _Array) -> _Array:
    """Ascending rows in the order of their rank, best first; equals in the order of their rows."""
    if settings.by == "random":
        return np.random.default_rng((settings.seed, 4)).permutation(rows_C)
    better = score_T[rows_C] if settings.by == "distant" else -score_T[rows_C]
    return rows_C[np.argsort(better, kind="stable")]
