"""`dimefm verify`: check every byte of a store against its checksums, its plan against its commits, and its embeddings
for their norm; and, if asked, encode rows again with the teacher.
"""

from __future__ import annotations

from array import array
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from cache_schemas import SchemaError
from cache_schemas.embedding_store import ATTRIBUTES_KEY, VIEWS, commit_path, failures_path, pixels_path, rows_path
from cache_schemas.pairs import CAPTION_PAIRS, HITS_COMMIT
from cache_schemas.plan import FILES_TABLE
from dimefm.caching.repeats import as_array, repeats
from dimefm.errors import DimefmError, StoreError
from dimefm.inspection.info import examine
from dimefm.inspection.verification import Verification
from dimefm.inspection.verify_captions import caption_pairs, check_caption_pairs
from dimefm.inspection.verify_shard import CheckShards, answering, in_one_line, is_normal, worker_bytes
from dimefm.store.added_views import is_addition, planned_additions
from dimefm.store.commit import remove_commit
from dimefm.store.embedding_store import Store
from dimefm.store.failures import failures_by_status
from dimefm.store.pairs_store import Pairs
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.progress import Progress
from dimefm.system.shard_work import ShardRunner, run_here


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to verify, and whether to mark what is bad."""

    store: str
    """Store to verify."""
    sample: int | None = None
    """Number of rows to encode again with the teacher and compare. Default: none."""
    teacher: str | None = None
    """Where the teacher is now, for `sample`. Default: where it was."""
    pretrained: str | None = None
    """Weights of a plain NAME given as `teacher`: an open_clip tag or a file."""
    repair: bool = False
    """Mark bad shards as not done, so that the command that wrote them does them again."""


def verify(config: VerifyConfig, run: ShardRunner = run_here) -> Verification:
    """Read and check a whole store; `run` has its shards checked. Raises StoreError or SchemaError where it cannot even
    be opened; UnreadableError where its storage does not answer: then nothing is known about its data, and no shard is
    marked."""
    store = _open(config.store)
    with writing(store.path) if config.repair else nullcontext():
        with answering(store):
            report = _check(store, run)
            stores = [store, *planned_additions(store)]
            report.additions = [_check(added, run) for added in stores[1:]]
        parts = list(zip(stores, (report, *report.additions), strict=True))
        if config.sample:
            from dimefm.inspection.verify_teacher import check_teacher

            check_teacher(parts, config)
        if config.repair:
            for part, found in parts:
                for shard in found.bad:
                    remove_commit(part.path, shard)
                found.repaired = bool(found.bad)
    return report


def _open(path: str) -> Store:
    """Open the store. Raises StoreError where something else lies there, and says what."""
    try:
        return Store(path, additions=0)
    except (SchemaError, StoreError):
        found = None
        with suppress(DimefmError, OSError, SchemaError):
            found = examine(path)
        if found is None or found.facts["artefact"] == "store":
            raise
        what = f"{found.title}; verify checks stores of embeddings alone"
        raise StoreError(what, remedy=f"dimefm info {path} describes it") from None


def _check(store: Store, run: ShardRunner) -> Verification:
    schema = store.schema
    report = Verification(store.path, schema.rows, len(store.committed()), schema.shards)
    hashes, damaged_plans = array("q"), dict[int, str]()
    with Progress("checking", schema.shards, "shard") as progress:
        work = CheckShards(store.path)
        found_shards = run(work, range(schema.shards), progress.note, memory=worker_bytes(schema))
        for done, (shard, found) in enumerate(found_shards, 1):
            hashes.frombytes(found.key_hashes)
            if found.fault:
                damaged_plans[shard] = found.fault
            if found.problems:
                report.bad[shard] = found.problems
            progress.at(done)
    report.faults += [damaged_plans[shard] for shard in sorted(damaged_plans)]
    _check_documents(store, report)
    pairs = caption_pairs(store)
    if pairs:
        problems = [*check_caption_pairs(store, pairs)]
        report.faults += [f"{one}: delete that folder, and run the same cache-images again" for one in problems]
        if not problems:
            report.notes.append(_describe_captions(pairs))
    _check_foreign(store, report, pairs)
    if not report.bad and store.contents.shards and not store.contents.good:
        report.empty = failures_by_status(store)
    if schema.kind == "image" and not is_addition(schema):
        _check_repeated(hashes, schema.source.repeated_keys, report)
    return report


def _check_repeated(hashes: array[int], expected: int, report: Verification) -> None:
    """Compare the number of repeated keys with that of the source. The hashes of 40 million keys are 320 MB."""
    repeated = sum(len(places) for places in repeats(as_array(hashes)))
    if repeated != expected:
        report.faults.append(f"repeated keys: {repeated:,}, where the source had {expected:,}")
    elif repeated:
        report.notes.append(f"repeated keys: {repeated:,}, as in the source; each has its own row")


def _check_documents(store: Store, report: Verification) -> None:
    """Check every byte of the attributes, and the table of files. The zarr.json of the arrays were compared when the
    store was opened."""
    path = storage.join(store.path, "zarr.json")
    attributes = store.group.attrs.asdict()
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    if attributes.keys() != {ATTRIBUTES_KEY} or not is_normal(path) or storage.read_json(path) != document:
        report.faults.append(f"{path} is damaged")
    try:
        store.source_files()
    except StoreError as error:
        report.faults.append(in_one_line(error))


def _describe_captions(pairs: Pairs) -> str:
    done, shards = len(pairs.committed()), pairs.schema.shards
    if done < shards or not storage.exists(storage.join(pairs.path, HITS_COMMIT)):
        return f"captions: whose they are is known for {done:,} of {shards:,} shards of images; run cache-images again"
    return f"captions of {pairs.hit_counts().images:,} of {pairs.schema.rows:,} images of {pairs.schema.images}"


def _check_foreign(store: Store, report: Verification, pairs: Pairs | None) -> None:
    schema, shards = store.schema, range(store.schema.shards)
    expected = {"zarr.json"}
    expected |= {path(shard) for shard in shards for path in (commit_path, failures_path)}
    if not is_addition(schema):
        expected |= {FILES_TABLE, *map(rows_path, shards)}
    expected |= {pixels_path(shard) for shard in shards} if schema.pixels else set()
    for name in schema.arrays():
        expected |= {store.shard_file(name, shard) for shard in shards} | {f"{name}/zarr.json"}
    expected |= {storage.join(CAPTION_PAIRS, name) for name in pairs.files()} if pairs else set()
    own = {name for name in storage.tree(store.path) if not _of_addition(name)}
    foreign = sorted(own - expected)
    report.faults += [
        f"{storage.join(store.path, name)} does not belong to the store: move it away" for name in foreign
    ]


def _of_addition(name: str) -> bool:
    """Whether a file of a store is one of an addition of views, which is checked by itself."""
    folder, _, rest = name.partition("/")
    return folder == VIEWS and rest.partition("/")[0].isdecimal() and "/" in rest
