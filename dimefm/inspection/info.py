"""`dimefm info`: describe a store, index, pairs, selection or run on one screen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from cache_schemas import EmbeddingStore, Failure, PairsStore, Status, TeacherIdentity
from cache_schemas.embedding_store import ATTRIBUTES_KEY, EMBEDDING
from cache_schemas.index import BUILD, SIDECAR_FILE, IndexSidecar
from cache_schemas.pairs import HITS_COMMIT
from cache_schemas.run import RUN_FILE
from cache_schemas.text_selection import PLAN_FILE, REPORT_FILE, SCORES, SELECTION_FILE, SelectionPlan
from dimefm.errors import StoreError
from dimefm.selection.report import describe_settings
from dimefm.sources.account import describe_skipped, first_lines
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system import storage
from dimefm.system.inert_text import line
from dimefm.system.named_paths import named
from dimefm.system.progress import amount
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.read_metrics import last_validation, read_metrics
from dimefm.training.run_folder import read_run

_FAILURES, _EXAMPLES, _SHOWN = 10, 5, 12


def describe(path: str) -> str:
    """A few lines about the store, index, pairs, selection or run at `path`. Raises StoreError for anything else."""
    if storage.exists(storage.join(path, RUN_FILE)):
        return _run(path)
    if storage.exists(storage.join(path, SIDECAR_FILE)):
        where = storage.join(path, SIDECAR_FILE)
        return _index(path, IndexSidecar.parse(storage.read_json(where), where))
    if storage.exists(storage.join(path, PLAN_FILE)):
        return _selection(path)
    parts = [name for name in storage.listing(storage.join(path, BUILD)) if name.endswith(".json")]
    if parts:
        return _table(
            f"{path}: FAISS index, unfinished", [("done", f"{len(parts):,} steps; build-index goes on there")]
        )
    attributes = storage.join(path, "zarr.json")
    group = storage.read_json(attributes) if storage.exists(attributes) else {}
    document = group.get("attributes", {}).get(ATTRIBUTES_KEY)
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema == EmbeddingStore.SCHEMA:
        return _store(Store(path))
    if schema == PairsStore.SCHEMA:
        return _pairs(Pairs(path))
    raise StoreError(
        f"{path} is no store, index, selection or run of dimefm", remedy="give the --out of one of its commands"
    )


def list_failures(path: str) -> Iterator[str]:
    """A tab-separated line for each row of a store without an embedding, after one with the names of the columns."""
    yield "row\tkey\tstatus\tfile\treason"
    store = Store(path)
    for commit in store.commits():
        for f in store.failures(commit):
            yield "\t".join(" ".join(str(part).split()) for part in (f.row, f.key, f.status, f.file, f.reason))


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([line(title), *(f"  {line(name):<{width}}  {line(value)}" for name, value in rows)])


def _teacher(teacher: TeacherIdentity) -> list[tuple[str, str]]:
    pre = teacher.preprocessing
    tag = f" ({teacher.pretrained})" if teacher.pretrained else ""
    origin = f"; from {teacher.preprocessing_from}" if teacher.preprocessing_from else ""
    return [
        ("teacher", f"{teacher.name}{tag}, {teacher.embed_dim} wide, {teacher.activation}, {teacher.precision}"),
        ("weights", f"sha256 {teacher.weights[:16]}"),
        ("preprocessing", f"{pre.size[0]} x {pre.size[1]} px, {pre.resize_mode}, {pre.interpolation}{origin}"),
    ]


def _store(store: Store) -> str:
    schema, source = store.schema, store.schema.source
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    done, seconds = 0, 0.0
    for commit in store.commits():
        counts.update(commit.counts)
        if len(failures) < _FAILURES:
            failures += islice(store.failures(commit), _FAILURES - len(failures))
        done, seconds = done + 1, seconds + commit.seconds
    failed = sum(count for name, count in counts.items() if name != Status.OK.name)
    rows = [
        ("rows", f"{schema.rows:,} of {source.files:,} files, {amount(source.bytes)}"),
        ("shards", f"{done:,} of {schema.shards:,} done, {schema.shard_rows:,} rows each"),
        ("status", ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "nothing done yet"),
        ("embeddings", f"{schema.dtype} {_shape(schema)}, {amount(_bytes(schema))}"),
        *_teacher(schema.teacher),
        ("identity", schema.identity[:16]),
    ]
    if schema.views:
        low, high = schema.views.crop_scale
        rows.append(("views", f"{schema.views.count} per image, crops of {low:g} to {high:g} of its area"))
    if schema.pixels:
        rows.append(("pixels", f"JPEGs of short side {schema.pixels}, which train-student reads"))
    rows += [(name.replace("_", " "), str(value)) for name, value in source.settings.items()]
    if source.repeated_keys:
        rows.append(("repeated keys", f"{source.repeated_keys:,}; each keeps its own row"))
    rows += [("skipped", describe_skipped(one)) for one in source.skipped]
    rows += [("skipped", f"{reason}: {count:,}") for reason, count in source.dropped.items() if count]
    rows += [("problem", problem) for problem in first_lines(source.problems, _FAILURES)]
    rows += [("failed", f"row {f.row}, {f.key}: {f.status}, {f.reason}") for f in failures]
    if failed > len(failures):
        rows.append(("", f"and {failed - len(failures):,} more"))
    if seconds:
        rows.append(("worker time", f"{seconds:,.0f} s, {sum(counts.values()) / seconds:,.1f} rows/s per worker"))
    return _table(f"{store.path}: {schema.kind} embeddings", rows)


def _bytes(schema: EmbeddingStore) -> int:
    return math.prod(schema.arrays()[EMBEDDING].shape) * schema.item_bytes


def _shape(schema: EmbeddingStore) -> str:
    return f"({', '.join(f'{n:,}' for n in schema.arrays()[EMBEDDING].shape)})"


def _index(path: str, sidecar: IndexSidecar) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in sidecar.search_parameters.items()) or "none"
    rows = [
        ("vectors", f"{sidecar.rows:,} {sidecar.kind}s, {sidecar.skipped:,} skipped, {sidecar.dim} wide"),
        ("factory", f"{sidecar.factory}, search parameters: {parameters}, re-scoring x{sidecar.rescore}"),
        *(
            ("recall", f"@{r.k} {r.value:.4f} over {r.queries:,} {r.source} queries (target {sidecar.recall_target})")
            for r in sidecar.recall
        ),
        ("size", f"{amount(sidecar.bytes)}, {sidecar.bytes_per_vector:,.0f} bytes per vector"),
        ("store", f"{sidecar.store} ({sidecar.store_identity[:16]})"),
        *_teacher(sidecar.teacher),
        ("speed", f"{sidecar.queries_per_second:,.0f} queries/s when it was tuned"),
        ("built in", f"{sidecar.seconds:,.1f} s, trained on {sidecar.train_rows:,} rows, seed {sidecar.seed}"),
    ]
    return _table(f"{path}: FAISS index", rows)


def _pairs(pairs: Pairs) -> str:
    schema = pairs.schema
    if not storage.exists(storage.join(pairs.path, HITS_COMMIT)):
        done = len(pairs.committed())
        return _table(f"{pairs.path}: pseudo texts, unfinished", [("shards", f"{done:,} of {schema.shards:,} done")])
    counts = pairs.hit_counts()
    share = counts.selected / counts.text_rows
    hits = pairs.hits()
    rows = [
        ("images", f"{counts.images:,} of {schema.rows:,}, the nearest {schema.top_k} sentences each"),
        ("skipped", f"{counts.skipped:,} images without a usable embedding"),
        ("selected", f"{counts.selected:,} of {counts.text_rows:,} sentences, {share:.1%}, by at least one image"),
        ("mean score", f"{counts.mean_score:.4f}"),
        ("images store", schema.images),
        ("texts store", schema.texts),
        ("index", schema.index),
    ]
    if not _beside(pairs.path, schema.texts):
        rows.append(("examples", "none: they are in the texts store, which info does not open there"))
    elif storage.exists(schema.texts):
        best = np.argpartition(hits, -min(_EXAMPLES, len(hits)))[-_EXAMPLES:]
        best = best[np.argsort(-hits[best].astype(np.int64), kind="stable")]
        rows += [(f"{hits[s['row']]:,} hits", s["text"][:80]) for s in Store(schema.texts).samples(best)]
    return _table(f"{pairs.path}: pseudo texts", rows)


def _beside(path: str, other: str) -> bool:
    """Whether info opens `other`, which the document at `path` names: a local folder, or a place in the same bucket as
    `path`, which the user typed."""
    if storage.is_url(other):
        bucket = "/".join(path.split("/", 3)[:3])
        return storage.is_url(path) and "::" not in other and other.startswith(f"{bucket}/")
    try:
        return bool(named(other, path))
    except StoreError:
        return False


def _selection(path: str) -> str:
    if not storage.exists(storage.join(path, SELECTION_FILE)):
        where = storage.join(path, PLAN_FILE)
        plan = SelectionPlan.parse(storage.read_json(where), where)
        shards = Store(plan.texts).schema.shards if _beside(path, plan.texts) and storage.exists(plan.texts) else 0
        done = len(storage.listing(storage.join(path, SCORES)))
        state = [("scores", f"{done:,} of {shards:,} shards done")] if plan.settings.by == "similarity" else []
        return _table(f"{storage.absolute(path)}: selected texts, unfinished", [*state, ("texts store", plan.texts)])
    selected = SelectedTexts(path)
    found = selected.document
    sources = sorted(found.sources, key=lambda s: (-s.kept, s.file))
    rows = [
        ("kept", f"{found.kept:,} of {found.rows:,} sentences, {found.kept / found.rows:.1%}"),
        ("how", describe_settings(found)),
        *(("left out", f"{count:,} {reason}") for reason, count in found.dropped.items()),
        *(
            ("of", f"{s.file or '(no file)'}: {s.kept:,} of {s.rows:,}, {s.kept / s.rows:.1%}")
            for s in sources[:_SHOWN]
        ),
        *([("", f"and {len(sources) - _SHOWN:,} files more")] if len(sources) > _SHOWN else []),
        ("texts store", found.plan.texts),
        ("images store", found.plan.images),
        ("pairs", found.plan.pairs),
        ("read more", storage.join(selected.path, REPORT_FILE)),
    ]
    return _table(f"{selected.path}: selected texts", rows)


def _run(path: str) -> str:
    run, checkpoints = read_run(path), Checkpoints(path)
    config = TrainConfig.parse(run.config, str(Path(path) / RUN_FILE))
    loss = vars(config.loss)
    usual = {**vars(LossConfig()), **dict.fromkeys(LossConfig.WEIGHTS, 0)}  # a weight is shown unless it is 0
    changed = {name: value for name, value in loss.items() if value != usual[name]}
    train = [line for line in read_metrics(path) if line["event"] == "train"]
    rows = [
        ("student", f"{run.student.name} at {run.student.image_size} px, {run.student.embed_dim} wide"),
        *([("text student", run.text_student.name)] if run.text_student else []),
        ("steps", f"{checkpoints.step() or 0:,} of {run.steps:,}, batches of {config.batch_size:,}"),
        ("loss", ", ".join(f"{k} {v}" for k, v in changed.items())),
        *([("machine", f"{run.machine}, {config.precision}, torch threads {config.threads}")] if run.machine else []),
        *_teacher(run.teacher),
        ("images", config.images),
        ("texts", config.texts),
    ]
    if train:
        rows.append(("last", f"loss {train[-1]['loss']:.4f}, {train[-1]['images_per_second']:,.0f} images/s"))
    rows += [("validation", f"{name} top-1 {score:.3f}") for name, score in last_validation(path).items()]
    best = checkpoints.step("best")
    rows.append(("checkpoints", ", ".join(f"{s:,}{' (best)' if s == best else ''}" for s in checkpoints.steps())))
    rows += [("changed", f"{c.field} after step {c.step:,}: {c.values}") for c in run.changes]
    return _table(f"{Path(path)}: training run", rows)
