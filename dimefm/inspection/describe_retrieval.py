"""What `info` knows of an index, of pairs and of a selection."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from cache_schemas import SchemaError
from cache_schemas.document import to_plain
from cache_schemas.index import SIDECAR_FILE, IndexSidecar
from cache_schemas.pairs import HITS_COMMIT
from cache_schemas.text_selection import PLAN_FILE, REPORT_FILE, SCORES, SELECTION_FILE, SelectionPlan
from dimefm.errors import DimefmError, MismatchError, StoreError
from dimefm.inspection.description import Description, Rows
from dimefm.models.teacher_rows import teacher_rows
from dimefm.retrieval.index_sidecar import describe_search
from dimefm.selection.report import describe_settings, left_out
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system import storage
from dimefm.system.named_paths import named
from dimefm.system.progress import amount
from dimefm.system.wording import counted

_EXAMPLES, _SHOWN = 5, 12


def describe_index(path: str) -> Description:
    """A finished index."""
    where = storage.join(path, SIDECAR_FILE)
    sidecar = IndexSidecar.parse(storage.read_json(where), where)
    known = sidecar.to_json()
    facts = {"artefact": "index", "path": storage.absolute(path), "finished": True}
    facts |= {name: known[name] for name in known if name not in _NOT_OF_USE}
    facts["bytes_per_vector"] = sidecar.bytes_per_vector
    return Description(f"{path}: FAISS index", facts, _index(facts, sidecar))


_NOT_OF_USE = ("schema", "version", "checksum", "shards", "spread", "versions")  # of a sidecar


def describe_unfinished_index(path: str, steps: int) -> Description:
    """An index of which `steps` steps are done."""
    facts = {"artefact": "index", "path": storage.absolute(path), "finished": False, "steps_done": steps}
    rows = [("done", f"{counted(steps, 'step')}; the same build-index goes on there")]
    return Description(f"{path}: FAISS index, unfinished", facts, rows)


def _index(facts: dict[str, Any], sidecar: IndexSidecar) -> Rows:
    searches = [sidecar.search_of(recall.source) for recall in sidecar.recall]
    return [
        ("vectors", f"{counted(facts['rows'], facts['kind'])}, {facts['skipped']:,} skipped, {facts['dim']} wide"),
        ("factory", facts["factory"]),
        *((f"{one.source} queries", describe_search(one, sidecar.recall_target)) for one in searches),
        ("size", f"{amount(facts['bytes'])}, {facts['bytes_per_vector']:,.0f} bytes per vector"),
        ("store", f"{facts['store']} ({facts['store_identity'][:16]})"),
        *teacher_rows(facts["teacher"]),
        (
            "built in",
            f"{facts['seconds']:,.1f} s, trained on {counted(facts['train_rows'], 'row')}, seed {facts['seed']}",
        ),
    ]


def describe_pairs(path: str) -> Description:
    """The nearest sentences of images, finished or not."""
    pairs = Pairs(path)
    schema = pairs.schema
    facts: dict[str, Any] = {
        "artefact": "pairs",
        "path": pairs.path,
        "kind": schema.kind,
        "finished": storage.exists(storage.join(pairs.path, HITS_COMMIT)),
        "rows": schema.rows,
        "top_k": schema.top_k,
        "text_rows": schema.text_rows,
        "images_store": schema.images,
        "texts_store": schema.texts,
        "index": schema.index,
        "shards": schema.shards,
        "shards_done": len(pairs.committed()),
    }
    captions = schema.kind == "captions"
    title = f"{pairs.path}: pairs, the {'captions' if captions else 'nearest sentences'} of each image"
    if not facts["finished"]:
        again = f"the same {'cache-images' if captions else 'retrieve'} goes on there"
        done = [("shards", f"{facts['shards_done']:,} of {facts['shards']:,} done; {again}")]
        return Description(f"{title}, unfinished", facts, done)
    counts = pairs.hit_counts()
    facts |= {name: getattr(counts, name) for name in ("images", "skipped", "selected", "mean_score")}
    facts |= {"examples_opened": may_open(pairs.path, schema.texts), "examples": _examples(pairs)}
    return Description(title, facts, _pairs(facts))


def _examples(pairs: Pairs) -> list[dict[str, Any]]:
    """The sentences that most images have, where their store may be opened and is what it was."""
    hits = pairs.hits()
    try:
        texts = named_store(pairs, "text")
    except (DimefmError, SchemaError):
        return []
    best = np.argpartition(hits, -min(_EXAMPLES, len(hits)))[-_EXAMPLES:]
    best = best[np.argsort(-hits[best].astype(np.int64), kind="stable")]
    samples = texts.samples(best)
    return [{"row": int(one["row"]), "hits": int(hits[one["row"]]), "text": one["text"]} for one in samples]


def _pairs(facts: dict[str, Any]) -> Rows:
    found, sentences = facts["selected"], facts["text_rows"]
    captions = facts["kind"] == "captions"
    sentences_each = f"up to {counted(facts['top_k'], 'caption')} each"
    if not captions:
        sentences_each = f"the nearest {counted(facts['top_k'], 'sentence')} each"
    rows = [
        ("images", f"{facts['images']:,} of {facts['rows']:,}, {sentences_each}"),
        ("skipped", f"{counted(facts['skipped'], 'image')} without a {'caption or a ' * captions}usable embedding"),
        ("found", f"{found:,} of {sentences:,} sentences, {found / sentences:.1%}, by at least one image"),
        ("mean score", f"{facts['mean_score']:.4f}, a cosine"),
        ("images store", facts["images_store"]),
        ("texts store", facts["texts_store"]),
        ("index", facts["index"]),
    ]
    if not facts["examples_opened"]:
        rows.append(("examples", "none: info does not open that texts store"))
    return [*rows, *((counted(one["hits"], "hit"), one["text"][:80]) for one in facts["examples"])]


def may_open(path: str, other: str) -> bool:
    """Whether info and report open `other`, which the document at `path` names: a local folder, or a place in the same
    bucket as `path`, which the user typed."""
    if storage.is_url(other):
        bucket = "/".join(path.split("/", 3)[:3])
        return storage.is_url(path) and "::" not in other and other.startswith(f"{bucket}/")
    try:
        return bool(named(other, path))
    except StoreError:
        return False


def named_store(pairs: Pairs, kind: Literal["image", "text"]) -> Store:
    """The store of images or of texts that pairs name. Raises StoreError where it may not be opened, or is not there or
    damaged, SchemaError as Store does, MismatchError where it is another than these pairs were made from."""
    schema = pairs.schema
    path, identity = (
        (schema.images, schema.images_identity) if kind == "image" else (schema.texts, schema.texts_identity)
    )
    if not may_open(pairs.path, path):
        what = f"{path} is not opened, since only the document of {pairs.path} names it"
        raise StoreError(what, remedy="keep both in one bucket, or copy them to local folders")
    store = Store(path)
    if store.schema.identity != identity:
        raise MismatchError(f"{path} is another store than the one that {pairs.path} was made from")
    return store


def describe_selection(path: str) -> Description:
    """A selection, finished or not."""
    title = f"{storage.absolute(path)}: selected texts"
    if not storage.exists(storage.join(path, SELECTION_FILE)):
        return _unfinished_selection(path, f"{title}, unfinished")
    selected = SelectedTexts(path)
    found = selected.document
    facts = {
        "artefact": "selection",
        "path": selected.path,
        "finished": True,
        "rows": found.rows,
        "kept": found.kept,
        "how": describe_settings(found),
        "settings": to_plain(found.plan.settings),
        "left_out": [{"reason": reason, "sentences": count} for reason, count in left_out(found)],
        "clusters": found.clusters,
        "cap": found.cap,
        "sources": to_plain(sorted(found.sources, key=lambda source: (-source.kept, source.file))),
        "texts_store": found.plan.texts,
        "images_store": found.plan.images,
        "pairs": found.plan.pairs,
        "report": storage.join(selected.path, REPORT_FILE),
    }
    return Description(title, facts, _selection(facts))


def _unfinished_selection(path: str, title: str) -> Description:
    where = storage.join(path, PLAN_FILE)
    plan = SelectionPlan.parse(storage.read_json(where), where)
    facts = {
        "artefact": "selection",
        "path": storage.absolute(path),
        "finished": False,
        "settings": to_plain(plan.settings),
        "texts_store": plan.texts,
    }
    rows = [("texts store", plan.texts)]
    if plan.settings.by == "similarity":
        there = may_open(path, plan.texts) and storage.exists(plan.texts)
        facts["shards"] = Store(plan.texts).schema.shards if there else 0
        facts["shards_done"] = len(storage.listing(storage.join(path, SCORES)))
        rows.insert(0, ("scores", f"{facts['shards_done']:,} of {facts['shards']:,} shards done"))
    return Description(title, facts, rows)


def _selection(facts: dict[str, Any]) -> Rows:
    sources = facts["sources"]
    return [
        ("kept", f"{facts['kept']:,} of {facts['rows']:,} sentences, {facts['kept'] / facts['rows']:.1%}"),
        ("how", facts["how"]),
        *(("left out", f"{one['sentences']:,}: {one['reason']}") for one in facts["left_out"]),
        *(
            ("of", f"{s['file'] or '(no file)'}: {s['kept']:,} of {s['rows']:,}, {s['kept'] / s['rows']:.1%}")
            for s in sources[:_SHOWN]
        ),
        *([("", f"and {counted(len(sources) - _SHOWN, 'more file')}")] if len(sources) > _SHOWN else []),
        ("texts store", facts["texts_store"]),
        ("images store", facts["images_store"]),
        ("pairs", facts["pairs"]),
        ("read more", facts["report"]),
    ]
