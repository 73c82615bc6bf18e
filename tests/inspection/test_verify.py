"""`dimefm verify`: whatever a disk or a hand does to a store is found, and reads of it fail rather than give other
values.

The stores have two shards of several chunks, a row that failed, views, and pixels: every kind of file there is.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from cache_schemas import Commit, SchemaError, Status, ViewPlan
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.cli import cli
from dimefm.errors import StoreError, UnreadableError
from dimefm.inspection.verify import Verification, VerifyConfig, verify
from dimefm.inspection.verify_shard import CheckShards
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.store.parquet_tables import sha256, write_table
from dimefm.system import storage
from dimefm.system.shard_work import Seat
from dimefm.system.storage import files as storage_files
from tests.making import read_tar, write_tar
from tests.other_processes import run_elsewhere
from tests.stores import random_store

BROKEN = 2  # the row whose image cannot be decoded
VIEWS = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True)
KINDS = {"image": {}, "full": {"views": VIEWS, "pixels": 64}, "text": {}}


def encode_rest(request: PlanRequest, out: Path, clip: Clip) -> Store:
    """What the cache command does, without Ray: plan or open, and every shard without a commit."""
    store = open_or_plan(request, str(out), clip.identity)
    for shard in sorted(set(range(store.schema.shards)) - store.committed()):
        encode_shard(store, shard, clip)
    return store


@pytest.fixture(scope="module")
def requests(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PlanRequest]:
    folder = tmp_path_factory.mktemp("sources")
    members = read_tar(sample / "images" / "train-00000.tar", 11)
    members[list(members)[BROKEN]] = b"no image"
    images = write_tar(folder / "images.tar", members)
    texts = folder / "texts.txt"
    texts.write_text("".join(f"sentence number {n}\n" for n in range(11)))

    def request(kind: Any, source: Path, settings: dict[str, Any]) -> PlanRequest:
        return PlanRequest(kind=kind, arguments=(str(source),), shard_rows=8, batch_size=4, **settings)

    return {
        name: request("text" if name == "text" else "image", texts if name == "text" else images, settings)
        for name, settings in KINDS.items()
    }


@pytest.fixture(scope="module")
def stores(requests: dict[str, PlanRequest], clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished store of each kind. Not to be written to."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimefm.caching.plan._CHUNK", 4)
        for name, request in requests.items():
            encode_rest(request, folder / f"{name}.zarr", clip)
    return {name: folder / f"{name}.zarr" for name in requests}


@pytest.fixture
def copy(stores: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the store of a kind, to be damaged."""

    def make(kind: str) -> Path:
        return Path(shutil.copytree(stores[kind], tmp_path / f"{kind}.zarr"))

    return make


def run(store: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["verify", str(store), "--quiet", *words])


def found(store: Path) -> str:
    """What verify says of a store that must not be trusted; fails where it trusts it, or was not written to say it."""
    result = run(store)
    assert isinstance(result.exception, SystemExit), f"traced: {result.exception!r}"
    assert result.exit_code == 1, result.output
    assert "can be trusted" not in result.output
    return result.output


def test_progress_is_shown(text_store: Store) -> None:
    shards = text_store.schema.shards
    shown = CliRunner().invoke(cli, ["verify", text_store.path]).stderr
    assert shown.startswith(f"checking: {shards} of {shards} shards (100%)")


def check(store: Path, **options: Any) -> Verification:
    return verify(VerifyConfig(store=str(store), **options))


def files(store: Path) -> list[Path]:
    return [store / name for name in sorted(storage.tree(str(store)))]


def contents(store: Path) -> dict[str, bytes]:
    """Every file but commits, which say when they were made."""
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in files(store) if p.parent.name != "commits"}


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def reads(path: Path) -> dict[str, Callable[[], Any]]:
    """Everything that a Store can be asked for, but the JPEGs, which only verify checks."""
    store = Store(str(path))
    rows, shards = np.arange(store.schema.rows), range(store.schema.shards)
    found: dict[str, Callable[[], Any]] = {
        "attributes": lambda: store.schema,
        "files": lambda: store.source_files().to_pylist(),
        "commits": lambda: list(store.commits()),
        "commit": lambda: [store.commit(shard) for shard in shards],
        "plan": lambda: store.samples(rows),
        "read": lambda: store.read(0, len(rows)).tobytes(),
        "gather": lambda: store.gather(rows[::-1]).tobytes(),
        "embeddings": lambda: store.embeddings(rows).tobytes(),
        "status": lambda: store.status().tobytes(),
        "arrays": lambda: [array.tobytes() for shard in shards for array in store.shard_arrays(shard).values()],
    }
    if store.schema.views:
        found["views"] = lambda: [array.tobytes() for array in store.gather_view(rows, rows % 2)]
    if store.schema.pixels:
        found["pixels"] = lambda: [len(jpeg) for jpeg in store.pixels(np.array(rows))]
    return found


def read_all(path: Path) -> dict[str, Any]:
    """What each read gives; without those that raised."""
    values: dict[str, Any] = {}
    with suppress(StoreError, SchemaError):
        for name, read in reads(path).items():
            with suppress(StoreError, SchemaError):
                values[name] = read()
    return values


# -- sound and unfinished stores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_store_can_be_trusted(stores: dict[str, Path], kind: str) -> None:
    result = run(stores[kind])
    assert result.exit_code == 0, result.output
    assert result.output == f"{stores[kind]}: 11 rows, 2 of 2 shards done\n  the store can be trusted\n"


def test_an_unfinished_store_is_called_so(copy: Callable[[str], Path]) -> None:
    store = copy("full")
    (store / "commits" / "000001.json").unlink()
    result = run(store)
    assert result.exit_code == 1
    assert "1 of 2 shards done" in result.output
    assert "is unfinished: run the command that writes it again; the finished part can be" in " ".join(
        result.output.split()
    )


def test_a_store_that_is_verified_needs_no_lock_and_is_not_written_to(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    check(store)
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before


# -- one bit ----------------------------------------------------------------------------------------------------------


def places(path: Path, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Byte and bit of a few flips: the first, the middle and the last byte, and others; together all eight bits."""
    size = path.stat().st_size
    positions = [0, size // 2, size - 1, *(rng.randrange(size) for _ in range(5))]
    return zip(positions, rng.sample(range(8), 8), strict=True)


PARTS = ["zarr.json", "embedding", "status", "view", "pixel_index", "rows", "commits", "pixels"]


@pytest.mark.parametrize(("part", "kind"), [
    *((part, "full") for part in PARTS), ("rows", "text"),
    *(pytest.param(part, "text", marks=pytest.mark.slow) for part in ("zarr.json", "embedding", "status", "commits")),
])  # fmt: skip
def test_one_flipped_bit_is_found_and_never_read(copy: Callable[[str], Path], kind: str, part: str) -> None:
    store = copy(kind)
    chosen = [path for path in files(store) if path.relative_to(store).parts[0] == part]
    assert chosen
    sound, rng = read_all(store), random.Random(part)
    for path in chosen:
        for position, bit in places(path, rng):
            where = f"{path.relative_to(store)}, byte {position}, bit {bit}"
            flip(path, position, bit)
            assert found(store), where
            values = read_all(store)
            assert values == {name: sound[name] for name in values}, f"other values were read: {where}"
            assert part in ("pixels", "zarr.json") or len(values) < len(sound), f"all was read: {where}"
            flip(path, position, bit)
    assert read_all(store) == sound


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("zarr.json", '"node_type"', '"node_typf"'),
        ("zarr.json", '"attributes"', '"attrabutes"'),
        ("zarr.json", '"zarr_format"', '"zarr_formap"'),
        ("zarr.json", "\n", "\n\n"),
        ("embedding/zarr.json", '"configuration"', '"configuratiom"'),
        ("status/zarr.json", '"separator": "/"', '"separator": "."'),
        ("status/zarr.json", '"fill_value": 0', '"fill_value": 1'),
        ("embedding/zarr.json", '"attributes": {}', '"attributes": {"a": 1}'),
        ("commits/000000.json", "\n", "\n\n"),
    ],
)
def test_what_json_parsers_pass_over_is_found(copy: Callable[[str], Path], file: str, before: str, after: str) -> None:
    path = copy("image") / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert found(path.parents[file.count("/")])


def test_attributes_that_are_not_ours_are_found(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["other"] = 1
    (store / "zarr.json").write_bytes(storage.json_bytes(document))
    assert check(store).faults == [f"{store}/zarr.json is damaged"]


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'{"zarr_format": 3}', b"\xff\xfe", b"{"])
@pytest.mark.parametrize("file", ["zarr.json", "embedding/zarr.json", "commits/000000.json"])
def test_documents_of_another_kind_are_found(copy: Callable[[str], Path], file: str, data: bytes) -> None:
    store = copy("image")
    (store / file).write_bytes(data)
    assert found(store)


# -- files ------------------------------------------------------------------------------------------------------------


def test_each_missing_file_is_found(copy: Callable[[str], Path]) -> None:
    store = copy("full")
    for path in files(store):
        data = path.read_bytes()
        path.unlink()
        if path.parent.name == "commits":
            assert "unfinished" in run(store).output
        else:
            assert found(store), path
        path.write_bytes(data)


@pytest.mark.parametrize("left", [0, 1, -1])
def test_each_file_that_is_cut_short_is_found(copy: Callable[[str], Path], left: int) -> None:
    store = copy("full")
    for path in files(store):
        data = path.read_bytes()
        path.write_bytes(data[:left])
        assert found(store), path
        path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["embedding/c/2/0", "status/c/9", "commits/000002.json", "rows/000002.parquet", "note.txt", "old/zarr.json"]
)
def test_a_file_that_does_not_belong_is_named(copy: Callable[[str], Path], name: str) -> None:
    store = copy("image")
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_bytes(b"{}")
    assert f"{store}/{name} does not belong to the store: move it away" in found(store)


def test_a_commit_beyond_the_last_shard_does_not_stand_for_one_that_is_missing(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    (store / "commits" / "000001.json").rename(store / "commits" / "000007.json")
    assert Store(str(store)).committed() == {0}
    with pytest.raises(StoreError, match="1 of 2 shards are done"):
        Store(str(store)).require_complete()
    assert "1 of 2 shards done" in found(store)


# -- forgeries: every checksum fits ---------------------------------------------------------------------------------


def write_again(path: Path, shard: int, change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> None:
    """Change a shard's arrays and commit it as if they had been encoded so."""
    store = Store(str(path))
    commit = store.commit(shard)
    assert commit is not None
    arrays = {name: array.copy() for name, array in store.shard_arrays(shard).items()}
    change(arrays)
    store.write_shard(shard, arrays, commit.failures, pixels=commit.pixels, device="cpu", seconds=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, 0.5])
def test_embeddings_that_no_teacher_gives_are_found(copy: Callable[[str], Path], value: float) -> None:
    store = copy("full")
    write_again(store, 1, lambda arrays: arrays["embedding"][1].fill(value))
    assert check(store).bad == {1: ["embeddings that are NaN or not of norm 1: 1"]}


def test_an_embedding_of_a_row_that_failed_is_found(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    write_again(store, 0, lambda arrays: arrays["embedding"][BROKEN].fill(0.1))
    assert check(store).bad == {0: ["there are embeddings in rows that failed"]}


def test_the_commit_of_another_shard_is_found_and_not_read(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    shutil.copy(store / "commits" / "000000.json", store / "commits" / "000001.json")
    (problem,) = check(store).bad[1]
    assert problem.endswith("commits/000001.json is the commit of shard 0, rows 0 to 7")
    with pytest.raises(StoreError, match="is the commit of shard 0"):
        list(Store(str(store)).commits())


def forge_commit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text())
    commit = Commit.parse(raw, "here")
    path.write_bytes(storage.json_bytes(replace(commit, **changes).to_json()))


def test_a_commit_of_another_plan_is_found(copy: Callable[[str], Path]) -> None:
    store = copy("text")
    forge_commit(store / "commits" / "000000.json", plan=sha256(b""))
    assert check(store).bad == {0: ["it was written from another plan"]}


def test_counts_that_are_not_those_of_the_rows_are_found(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    forge_commit(store / "commits" / "000000.json", counts={"OK": 7, "MISSING": 1})
    assert check(store).bad == {0: ["its rows are 7 OK, 1 UNDECODABLE, and its commit says 7 OK, 1 MISSING"]}


def plan_again(path: Path, change: Callable[[dict[str, list[Any]]], object]) -> None:
    """Another plan of shard 0, with attributes that fit it, but for `repeated_keys`."""
    store = Store(str(path))
    table = store.plan(0)
    columns = table.to_pydict()
    change(columns)
    digest = write_table(str(path / "rows" / "000000.parquet"), pa.table(columns, schema=table.schema))
    document = json.loads((path / "zarr.json").read_text())
    schema = replace(store.schema, digests={**store.schema.digests, "rows/000000.parquet": digest})
    document["attributes"]["dimefm"] = schema.to_json()
    (path / "zarr.json").write_bytes(storage.json_bytes(document))


def test_another_plan_is_found(copy: Callable[[str], Path]) -> None:
    store = copy("text")
    plan_again(store, lambda columns: columns["text"].reverse())
    assert check(store).bad == {0: ["it was written from another plan"]}


def test_keys_that_come_twice_are_found(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    plan_again(store, lambda columns: columns["key"].__setitem__(1, columns["key"][0]))
    assert "repeated keys: 1, where the source had 0" in check(store).faults


def test_keys_that_came_twice_in_the_source_are_no_fault(sample: Path, tmp_path: Path, clip: Clip) -> None:
    for folder in ("one", "other"):
        write_tar(tmp_path / folder / "a.tar", read_tar(sample / "images" / "train-00000.tar", 2))
    request = PlanRequest(kind="image", arguments=(str(tmp_path / "one"), str(tmp_path / "other")), shard_rows=8)
    report = check(Path(encode_rest(request, tmp_path / "s.zarr", clip).path))
    assert report.trusted
    assert report.notes == ["repeated keys: 2, as in the source; each has its own row"]


@pytest.mark.parametrize("name", ["commits/000001.json", "status/c/1", "rows/000001.parquet"])
@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("url", [False, True])
def test_storage_that_does_not_answer_is_no_damage(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, number: int, url: bool
) -> None:
    """A sector that a local disk cannot read back is."""
    place = str(copy("image"))
    if url:
        fsspec.filesystem("memory").put(place, place, recursive=True)
        place = f"memory://{place}"

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(path: str, *words: Any) -> Any:
            if path == f"{place}/{name}":
                raise OSError(number, "no answer", path)
            return real(path, *words)

        return ask

    before = Store(place).committed()
    with monkeypatch.context() as patch:
        for call in ("exists", "read_bytes"):
            for module in (storage, storage_files):
                patch.setattr(module, call, failing(getattr(storage, call)))
        if number == errno.EIO and not url:
            assert not verify(VerifyConfig(store=place)).trusted
        else:
            with pytest.raises(UnreadableError, match=rf"{name} cannot be read: no answer\n  remedy: .*verify again"):
                verify(VerifyConfig(store=place, repair=True))
    assert Store(place).committed() == before
    assert verify(VerifyConfig(store=place)).trusted


def test_a_damaged_plan_does_not_make_embeddings_bad(copy: Callable[[str], Path]) -> None:
    """Writing the shard again would lose what is good: the plan is what must be put back."""
    store = copy("image")
    flip(store / "rows" / "000000.parquet", 50, 3)
    report = check(store, repair=True)
    assert report.bad == {}
    assert report.faults[0] == f"{store}/rows/000000.parquet is damaged: its checksum does not fit"
    assert Store(str(store)).committed() == {0, 1}


def test_a_damaged_plan_is_not_worked_from(copy: Callable[[str], Path], clip: Clip) -> None:
    store = copy("image")
    (store / "commits" / "000000.json").unlink()
    flip(store / "rows" / "000000.parquet", 50, 3)
    with pytest.raises(StoreError, match="is damaged: its checksum does not fit"):
        encode_shard(Store(str(store)), 0, clip)


def test_workers_elsewhere_find_what_one_process_finds(tmp_path: Path) -> None:
    """In any order. Keys that are repeated in other shards too, for which hashes of several processes must be equal."""
    keys = [f"k{row % 60}" for row in range(80)]
    store, _ = random_store(tmp_path / "s.zarr", rows=80, shard_rows=16, keys=keys, failed=(3,))
    for name in ("embedding/c/2/0", "embedding/c/4/0", "rows/000000.parquet", "rows/000002.parquet"):
        flip(Path(store.path, name), 100, 3)
    config = VerifyConfig(store=store.path)
    alone, found = verify(config), verify(config, run_elsewhere)
    assert (found.facts(), found.show()) == (alone.facts(), alone.show())
    assert sorted(alone.bad) == [2, 4]
    assert [fault.split()[0] for fault in alone.faults[:2]] == [f"{store.path}/rows/{n:06d}.parquet" for n in (0, 2)]
    assert alone.faults[-1].startswith("repeated keys: 4, where")  # 64 to 79 are 4 to 19, of which 16 to 19 can be read


def test_a_machine_without_the_mount_calls_no_shard_bad(tmp_path: Path) -> None:
    """Its worker is put aside, where others can read."""
    with pytest.raises(UnreadableError, match=r"gone is not a dimefm store(?s:.*)see the same files"):
        CheckShards(str(tmp_path / "gone")).open(Seat())


# -- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_rows_encoded_again_are_as_they_are_stored(stores: dict[str, Path], kind: str) -> None:
    report = check(stores[kind], sample=6)
    assert report.trusted
    (note,) = report.notes
    assert note.startswith("6 rows encoded again: least cosine to what is stored 1.0000")


@pytest.mark.parametrize("kind", ["full", "text"])
def test_embeddings_of_other_rows_are_found_by_a_sample_alone(copy: Callable[[str], Path], kind: str) -> None:
    store = copy(kind)
    write_again(store, 1, lambda arrays: arrays["embedding"].__setitem__(..., np.roll(arrays["embedding"], 1, axis=0)))
    assert check(store).trusted
    report = check(store, sample=11)
    assert report.bad.keys() == {1}
    assert len(report.bad[1]) == 3
    assert "row 8 (" in report.bad[1][0]
    assert ") encoded again has cosine 0." in report.bad[1][0]


def test_another_teacher_is_named(stores: dict[str, Path]) -> None:
    store = Store(str(stores["image"]))
    words = ["--sample", "2", "--teacher", "RN50", "--pretrained", "openai"]
    # a model of open_clip without weights, which need no download; it is another one all the same
    with pytest.MonkeyPatch.context() as patch:
        other = replace(store.schema.teacher, name="RN50", weights="other")
        patch.setattr("dimefm.models.clip.load_clip", lambda *_, **__: type("Other", (), {"identity": other}))
        result = run(Path(store.path), *words)
    assert result.exit_code == 1
    assert "RN50 is not the teacher of the store: weights: " in " ".join(result.output.split())


def test_images_that_are_gone_make_no_shard_bad(sample: Path, tmp_path: Path, clip: Clip) -> None:
    source = write_tar(tmp_path / "a.tar", read_tar(sample / "images" / "train-00000.tar", 3))
    request = PlanRequest(kind="image", arguments=(str(source),), shard_rows=8)
    store = Path(encode_rest(request, tmp_path / "s.zarr", clip).path)
    source.unlink()
    report = check(store, sample=2, repair=True)
    assert report.trusted
    assert report.notes[0].startswith("2 of 2 rows can no longer be read, such as row 0 (")


# -- repair -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_repaired_store_is_written_again_to_the_same_bytes(
    copy: Callable[[str], Path],
    stores: dict[str, Path],
    requests: dict[str, PlanRequest],
    clip: Clip,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dimefm.caching.plan._CHUNK", 4)
    store = copy(kind)
    shard = "1/0/0" if kind == "full" else "1/0"
    flip(store / "embedding" / "c" / shard, 3, 1)
    flip(store / "status" / "c" / "1", 0, 7)
    if kind == "full":
        (store / "pixels" / "000001.tar").unlink()
    report = check(store, repair=True)
    assert report.bad.keys() == {1}
    assert not (store / "commits" / "000001.json").exists()
    assert (store / "commits" / "000000.json").exists()
    encode_rest(requests[kind], store, clip)
    assert contents(store) == contents(stores[kind])
    assert check(store).trusted


def test_nothing_is_repaired_unless_asked_for(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    flip(store / "status" / "c" / "1", 0, 7)
    check(store)
    assert Store(str(store)).committed() == {0, 1}


def test_a_mistyped_store_is_refused_and_not_made(tmp_path: Path) -> None:
    result = run(tmp_path / "none.zarr", "--repair")
    assert result.exit_code == 1
    assert "none.zarr is not a dimefm store" in result.output
    assert not (tmp_path / "none.zarr").exists()


def test_a_report_says_what_is_wrong_and_what_to_do(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    flip(store / "status" / "c" / "1", 0, 7)
    (store / "embedding" / "c" / "0" / "0").unlink()
    (store / "note.txt").touch()
    assert found(store).splitlines() == [
        f"{store}: 11 rows, 2 of 2 shards done",
        f"  bad   shard 0: {store}/embedding/c/0/0 is missing",
        f"  bad   shard 1: {store}/status/c/1 is damaged: its checksum does not fit",
        f"  bad   {store}/note.txt does not belong to the store: move it away",
        "  the store must not be trusted; to mend the 2 bad shards, give --repair, then",
        "  run the command that wrote the store again",
    ]
    lines = run(store, "--repair").output.splitlines()
    again = "run the command that wrote the store again"
    assert " ".join("".join(lines[-2:]).split()) == f"2 bad shards marked: {again}, then verify again"


def test_a_report_of_many_faults_is_cut(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    for number in range(30):
        (store / f"note{number}.txt").touch()
    lines = found(store).splitlines()
    assert len(lines) == 23
    assert lines[-2] == "  bad   and 10 more"


def test_a_status_code_of_no_meaning_is_found(copy: Callable[[str], Path]) -> None:
    store = copy("image")
    Store(str(store)).group["status"][9] = max(Status) + 1
    assert any(f"rows are 2 OK, 1 {max(Status) + 1}" in problem for problem in check(store).bad[1])


def test_a_shard_that_is_written_again_is_read_as_it_is_now(copy: Callable[[str], Path]) -> None:
    store = Store(str(copy("image")))
    arrays = store.shard_arrays(1)
    before = store.read(8, 11)
    store.write_shard(1, arrays | {"embedding": arrays["embedding"][::-1]}, [], device="cpu", seconds=1)
    np.testing.assert_array_equal(store.read(8, 11), before[::-1])


def test_a_shard_that_is_being_written_again_is_not_committed(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: str) -> None:
        raise KeyboardInterrupt

    store = Store(str(copy("image")))
    arrays = store.shard_arrays(1)
    monkeypatch.setattr("dimefm.system.storage.flush", stop)
    with pytest.raises(KeyboardInterrupt):
        store.write_shard(1, arrays, [], device="cpu", seconds=1)
    assert store.committed() == {0}
