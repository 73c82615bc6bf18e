"""`select-texts`: which sentences of a text store are worth training on, judged by images.

Shapes: T sentences of the store, N image rows of a shard, K sentences per image.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_schemas import Status
from cache_schemas.text_selection import (
    CLUSTERS,
    GROUNDING,
    PLAN_FILE,
    REPORT_FILE,
    ROWS_FILE,
    SCORES,
    SELECTION_FILE,
    SENTENCES_FILE,
    Ranking,
    SelectionPlan,
    SelectionSettings,
    TextSelection,
)
from dimefm.errors import MismatchError, SelectionError
from dimefm.selection.choose_texts import REASON_TEXTS, ChosenTexts, choose_texts, in_words
from dimefm.selection.narrow import Outcome
from dimefm.selection.report import examples, histogram, markdown_report, write_kept
from dimefm.store.embedding_store import Store, require_same_data, require_same_teacher
from dimefm.store.leaked_rows import NO_ROWS, LeakedRows
from dimefm.store.output_folder import OWN_AND_NEW, differing, in_lines, require_only, require_same
from dimefm.store.pairs_store import AGAIN, AGAIN_TEXTS, Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.store.zarr_arrays import digest_arrays
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.lock import writing
from dimefm.system.machine import choose_device
from dimefm.system.named_paths import named
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.progress import Progress
from dimefm.system.shard_work import ShardRunner, run_here
from dimefm.system.wording import counted

IMAGES_SAMPLE = 16384
_DATA = ("images_data", "texts_data")  # not compared with what was made before they were kept


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How to select sentences, and from what.

    The sentences are ranked, `by`
      hits        how many images have them among their top k; if equal, the one with the best cosine first. Sentences
                  without a hit are left out. Without other conditions this is the union over images, which trained the
                  best students of all that were tried (benchmarks/RESULTS.md);
      similarity  how far the images nearest to a sentence stand out from all others (selection.grounding.Grounding),
                  over a random sample of images;
      random      a random draw.
    Then these apply, each if it is given, and in this order: `min_hits`, `min_score`, `pool`, `dedup`, `balance`,
    `size`. From which cosine on two sentences are alike depends on the teacher: where all of its sentences lie in a
    narrow cone, a `dedup` of 0.98 may join sentences that have nothing in common. The report shows some that were left
    out, each with its better one.

    Raises SelectionError for settings without effect.
    """

    pairs: str
    """Pairs to select by, from retrieve; they name their image store and their text store."""
    out: str
    """Selection to write: a local folder, such as TEXTS.selection."""
    by: Ranking = "hits"
    """How sentences are ranked: by the number of images that retrieved them, by how far the images nearest to them
    stand out, or at random."""
    min_hits: int | None = None
    """Keep only sentences that are among the top k of this many images or more."""
    min_score: float | None = None
    """Keep only sentences with this score or more: the similarity if it ranks them, else their best cosine."""
    pool: int | None = None
    """Only this many best sentences go on to `dedup` and `balance`."""
    dedup: float | None = None
    """Leave out a sentence whose cosine to a better one, kept itself, is this or more."""
    balance: bool = False
    """Set the same cap on every cluster of similar sentences: the smallest that fills `size`."""
    size: int | None = None
    """Keep this many of the best sentences."""
    images_sample: int | None = None
    """Number of random images that the similarity compares with. Default: 16,384."""
    seed: int | None = None
    """Seed of the random ranking, the samples and the clusters. Default: 0."""
    images: str | None = None
    """Where the image store is now, if it was moved. Default: where retrieve read it."""
    texts: str | None = None
    """Where the text store is now, if it was moved. Default: where retrieve read it."""
    scores: str | None = None
    """Take the similarity scores of this other selection over the same stores."""
    without: str | None = None
    """Leave out the sentences that are captions of test images, which dimefm leaks found in the text store."""
    device: str | None = None
    """Where similarities are computed. Default: cuda if there is a GPU, else cpu."""

    def __post_init__(self) -> None:
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value is not None}
        low = ("--min-hits", "--pool", "--size", "--images-sample")
        wrong = [f"{n} must be 1 or more, found {given[n]}" for n in low if given.get(n, 1) < 1]
        if self.min_score is not None and not math.isfinite(self.min_score):
            wrong.append(f"--min-score must be a number, found {self.min_score}")
        if self.dedup is not None and not 0 < self.dedup < 1:
            wrong.append(f"--dedup must lie between 0 and 1, found {self.dedup}")
        clustered, scored = self.dedup is not None or self.balance, self.by == "similarity"
        needs = {
            "--images": ("--by similarity", scored),
            "--images-sample": ("--by similarity", scored),
            "--scores": ("--by similarity", scored),
            "--pool": ("--dedup or --balance", clustered),
            "--device": ("--by similarity, --dedup or --balance", scored or clustered),
            "--seed": ("--by similarity, --by random, --dedup or --balance", self.by != "hits" or clustered),
        }
        wrong += [
            f"{n} has no effect without {other}" for n, (other, there) in needs.items() if n in given and not there
        ]
        conditions = (self.size, self.min_hits, self.min_score, self.dedup)
        if self.by != "hits" and all(value is None for value in conditions):
            wrong.append("nothing says what to leave out: give --size, --min-score, --min-hits or --dedup")
        if self.balance and self.size is None:
            wrong.append("--balance has no effect without --size")
        if self.balance and self.pool is not None and self.size is not None and self.pool <= self.size:
            wrong.append(f"--balance has no effect: a --pool of {self.pool} leaves --size {self.size} no choice")
        if self.balance and scored and all(value is None for value in (self.pool, self.min_hits, self.min_score)):
            wrong.append(
                "--balance over the whole store takes from every cluster, grounded or not: give --pool as well"
            )
        if wrong:
            raise SelectionError("; ".join(wrong), remedy="change the named options")

    @property
    def computes(self) -> bool:
        """Whether embeddings are compared, which is what `device` and workers are for."""
        return self.by == "similarity" or self.dedup is not None or self.balance

    def settings(self, among: str | None, without: str | None = None) -> SelectionSettings:
        """What decides the result, with the defaults filled in."""
        return SelectionSettings(
            by=self.by,
            among=among,
            min_hits=1 if self.by == "hits" and self.min_hits is None else self.min_hits,
            min_score=self.min_score,
            pool=self.pool,
            dedup=self.dedup,
            balance=self.balance,
            size=self.size,
            images_sample=(self.images_sample or IMAGES_SAMPLE) if self.by == "similarity" else None,
            seed=self.seed or 0,
            without=without,
        )


def select_texts(
    config: SelectionConfig, rows: np.ndarray[Any, Any] | None = None, run: ShardRunner = run_here
) -> TextSelection:
    """Select sentences into the folder `config.out`; with `rows`, only from these rows of the text store. `run` scores,
    clusters and compares: here, or many shards at a time (pipeline.ray_shards).

    A run that was stopped goes on: scores, clusters and repetitions that were finished are kept. Where the selection is
    finished, nothing is done. On one kind of device the same call writes the same bytes. Raises OutputExistsError where
    `out` is something else or was made with other settings, MismatchError where the stores are not those of the pairs,
    StoreError where one of them is unfinished, SelectionError where no sentence is left.
    """
    require_name(config.out, "a selection", ".selection")
    out = storage.absolute(config.out)
    pairs = Pairs(config.pairs)
    hits_T = pairs.hits()
    texts = Store(config.texts or named(pairs.schema.texts, pairs.path))
    images = Store(config.images or named(pairs.schema.images, pairs.path)) if config.by == "similarity" else None
    _require_stores(pairs, images, texts)
    device = _find_device(config, texts.schema.rows) if config.computes else "cpu"
    among = None if rows is None else digest_arrays(np.unique(rows).astype(np.int64))
    leaks = LeakedRows(config.without, texts) if config.without else None
    plan = _plan(pairs, images, texts, config.settings(among, leaks.digest if leaks else None))
    with writing(out, of_use=lambda files: files - {PLAN_FILE}):
        _begin_or_continue(out, plan)
        if storage.exists(storage.join(out, SELECTION_FILE)):
            return SelectedTexts(out).document
        storage.remove_leftovers(out)
        if images is None:
            usable_T, score_T = _with_embedding(texts, plan.settings), best_cosines(pairs)
        else:
            score_T = _scores_by_similarity(config, plan, images, texts, device, run)
            usable_T = ~np.isnan(score_T)
        folder = storage.join(out, CLUSTERS)
        chosen = choose_texts(
            plan.settings,
            texts,
            usable_T,
            hits_T,
            score_T,
            rows=rows,
            leaked=leaks.rows() if leaks else NO_ROWS,
            folder=folder,
            device=device,
            run=run,
        )
        kept, dropped = _counts(chosen, plan)
        sources, digest = write_kept(out, texts, chosen.outcome_T, hits_T, score_T)
        selection = TextSelection(
            plan=plan,
            rows=texts.schema.rows,
            kept=kept,
            dropped=dropped,
            clusters=chosen.clusters,
            cap=chosen.cap,
            sources=sources,
            histogram=histogram(plan.settings, chosen.outcome_T, hits_T, score_T),
            examples=examples(plan.settings, texts, chosen, hits_T, score_T),
            digest=digest,
        )
        with storage.writing_to(out):
            storage.write_atomic(storage.join(out, REPORT_FILE), markdown_report(selection).encode())
            storage.remove_folder(folder)
            require_held(out)
            storage.write_json(storage.join(out, SELECTION_FILE), selection.to_json())
    return selection


def _plan(pairs: Pairs, images: Store | None, texts: Store, settings: SelectionSettings) -> SelectionPlan:
    return SelectionPlan(
        images=images.path if images else pairs.schema.images,
        images_identity=pairs.schema.images_identity,
        texts=texts.path,
        texts_identity=pairs.schema.texts_identity,
        pairs=pairs.path,
        pairs_digest=pairs.hit_counts().digest,
        settings=settings,
        images_data=pairs.hit_counts().images_data,
        texts_data=pairs.schema.texts_data,
    )


def _find_device(config: SelectionConfig, rows: int) -> str:
    note(f"{counted(rows, 'sentence')}: loading torch ...")
    return choose_device(config.device)


def _counts(chosen: ChosenTexts, plan: SelectionPlan) -> tuple[int, dict[str, int]]:
    """How many sentences are kept, and how many are not for each reason. Raises SelectionError if none is kept."""
    counts = np.bincount(chosen.outcome_T, minlength=len(Outcome)).tolist()
    dropped = {text: counts[outcome] for outcome, text in REASON_TEXTS.items() if counts[outcome]}
    if not counts[Outcome.KEPT]:
        why = in_lines(f"{n:,}: {in_words(reason, plan.settings, chosen.cap)}" for reason, n in dropped.items())
        raise SelectionError(f"no sentence is left:{why}", remedy="loosen these conditions")
    return counts[Outcome.KEPT], dropped


def _require_stores(pairs: Pairs, images: Store | None, texts: Store) -> None:
    expected = [("text", texts, pairs.schema.texts_identity, pairs.schema.texts_data, AGAIN_TEXTS)]
    if images is not None:
        expected.append(("image", images, pairs.schema.images_identity, pairs.hit_counts().images_data, AGAIN))
        require_same_teacher(images, texts)
    for kind, store, identity, data, again in expected:
        store.require_kind(kind)
        store.require_complete()
        if store.schema.identity != identity:
            what = f"{pairs.path} was retrieved over other {kind}s than {store.path}"
            raise MismatchError(what, remedy=f"say with --{kind}s where that store is now, or retrieve again")
        require_same_data(f"{pairs.path} was retrieved", data, store, remedy=again)


def _begin_or_continue(out: str, plan: SelectionPlan) -> None:
    """Write the plan, or see that an earlier run wrote the same. Raises OutputExistsError where `out` holds something
    else."""
    ours = {PLAN_FILE, SCORES, GROUNDING, CLUSTERS, ROWS_FILE, SENTENCES_FILE, REPORT_FILE, SELECTION_FILE}
    require_only(out, "a selection", ours)
    path = storage.join(out, PLAN_FILE)
    if not storage.exists(path):
        with storage.writing_to(out):
            storage.write_json(path, plan.to_json())
        return
    require_same(out, _plan_differences(SelectionPlan.parse(storage.read_json(path), path), plan))


def _plan_differences(own: SelectionPlan, new: SelectionPlan, names: Collection[str] = ()) -> dict[str, str]:
    """What differs in two plans: in all that decides the result, or in `names` alone."""
    own_facts, new_facts = _facts(own), _facts(new)
    unknown = [name for name in _DATA if own_facts[name] is None or new_facts[name] is None]
    differences = differing(own_facts, new_facts)
    return {name: differences[name] for name in differences if name in (names or differences) and name not in unknown}


def _facts(plan: SelectionPlan) -> dict[str, Any]:
    """All that decides the result, by name."""
    identities = ("images_identity", "texts_identity", "pairs_digest", *_DATA)
    return {**{name: getattr(plan, name) for name in identities}, **vars(plan.settings)}


def _with_embedding(texts: Store, settings: SelectionSettings) -> np.ndarray[Any, Any]:
    """Which sentences have an embedding that can be used, bool (T,).

    A sentence with a hit was found by its embedding, so where hits are needed, the status of the others is enough.
    Otherwise every embedding is read, for some may be NaN that no status speaks of.
    """
    usable_T: np.ndarray[Any, Any] = texts.status() == Status.OK
    if settings.min_hits is None:
        with Progress("reading", texts.schema.rows, "text") as progress:
            for shard in range(texts.schema.shards):
                start, stop = texts.schema.shard_range(shard)
                rows_N, _ = texts.valid_rows(start, stop)
                usable_T[start:stop] = False
                usable_T[rows_N] = True
                progress.at(stop)
    return usable_T


def _scores_by_similarity(
    config: SelectionConfig, plan: SelectionPlan, images: Store, texts: Store, device: str, run: ShardRunner
) -> np.ndarray[Any, Any]:
    """The score of each sentence, float32 (T,), NaN without an embedding. Raises MismatchError where `config.scores` is
    a selection by other images or settings."""
    if config.scores:
        names = ("images_identity", "texts_identity", *_DATA, "by", "images_sample", "seed")
        other = SelectedTexts(config.scores)
        differences = _plan_differences(other.document.plan, plan, names)
        if differences:
            what = f"the scores of {other.path} are not those asked for {OWN_AND_NEW}:{in_lines(differences)}"
            raise MismatchError(what, remedy="leave --scores out, or select with those settings")
    from dimefm.selection.grounding import score_by_grounding  # imports torch

    return score_by_grounding(
        images,
        texts,
        storage.absolute(config.out),
        count=plan.settings.images_sample or IMAGES_SAMPLE,
        seed=plan.settings.seed,
        device=device,
        earlier=storage.absolute(config.scores) if config.scores else None,
        run=run,
    )


def best_cosines(pairs: Pairs) -> np.ndarray[Any, Any]:
    """For each sentence the best cosine of the images that have it among their top k, float32 (T,); NaN without any."""
    best_T = np.full(pairs.schema.text_rows, -np.inf, np.float32)
    for shard in range(pairs.schema.shards):
        row_NK = pairs.text_rows(*pairs.schema.shard_range(shard))
        score_NK = pairs.scores(*pairs.schema.shard_range(shard)).astype(np.float32)
        np.maximum.at(best_T, row_NK[row_NK >= 0], score_NK[row_NK >= 0])
    best_T[np.isneginf(best_T)] = np.nan
    return best_T
