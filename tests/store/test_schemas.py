"""Documents on disk: what is written is read back, and what is wrong is reported in full, with its path."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schemas import (
    IMAGE_PLAN,
    TEXT_PLAN,
    Commit,
    Document,
    EmbeddingStore,
    Failure,
    HitCounts,
    IndexPart,
    IndexSidecar,
    PairsStore,
    Preprocessing,
    Recall,
    Run,
    SchemaError,
    SelectionPlan,
    SourceSummary,
    Status,
    StrongViews,
    StudentSpec,
    TeacherIdentity,
    TextSelection,
    ViewPlan,
    digest_of,
    parse_dataclass,
    parse_plan,
)
from cache_schemas.evaluation import EvaluationResult
from cache_schemas.export import Export, ExportOrigin, ExportSource, OnnxFacts
from cache_schemas.image_selection import ImageSelection, ImageSelectionPlan, ImageSelectionSettings
from cache_schemas.latency import Latency, Machine, ModelLatency, Timing
from cache_schemas.leaks import LeakedSet, Leaks
from cache_schemas.text_selection import Example, Histogram, SelectionSettings, SourceShare

PREPROCESSING = Preprocessing(
    size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bicubic", resize_mode="shortest"
)
TEACHER = TeacherIdentity(
    name="ViT-L-14",
    pretrained="openai",
    weights="a" * 64,
    activation="quick_gelu",
    preprocessing=PREPROCESSING,
    tokenizer="SimpleTokenizer",
    context_length=77,
    embed_dim=768,
    precision="fp32",
    logit_scale=100.0,
    logit_bias=None,
)
SOURCE = SourceSummary(
    arguments=("images/",),
    files=2,
    bytes=1000,
    digest="b" * 64,
    repeated_keys=1,
    dropped={"repeated": 3},
    problems=("a.tar: broken",),
)
STORE = EmbeddingStore(
    kind="image",
    rows=1000,
    dim=768,
    chunk_rows=64,
    shard_rows=256,
    batch_size=32,
    teacher=TEACHER,
    source=SOURCE,
)
FAILURE = Failure(row=3, key="猫", file="/data/a.tar", status="EMPTY", reason="no bytes")
COMMIT = Commit(
    shard=0,
    start=0,
    stop=256,
    counts={"OK": 255, "EMPTY": 1},
    failures=(FAILURE,),
    digest="c" * 64,
    device="cpu",
    seconds=1.5,
    finished="2025-01-01T00:00:00+00:00",
    versions={"torch": "2.6"},
)
SIDECAR = IndexSidecar(
    store="/data/texts.zarr",
    store_identity="d" * 64,
    kind="text",
    shards={"0": "6" * 64},
    rows=100,
    skipped=2,
    dim=768,
    teacher=TEACHER,
    factory="IVF64,SQfp16",
    search_parameters={"nprobe": 8},
    rescore=1,
    spread="ADwAPA==",
    recall=(Recall(k=10, queries=1000, source="held-out text", value=0.97),),
    recall_target=0.95,
    queries_per_second=1200.0,
    file="index-eeeeeeeeeeee.faiss",
    bytes=200,
    digest="e" * 64,
    train_rows=100,
    seconds=0.25,
    seed=0,
    versions={},
)
PAIRS = PairsStore(
    images="/data/images.zarr",
    images_identity="f" * 64,
    texts="/data/texts.zarr",
    texts_identity="0" * 64,
    index="/data/texts.index",
    index_digest="1" * 64,
    top_k=16,
    rows=1000,
    text_rows=100,
    shard_rows=256,
)
PART = IndexPart(settings="7" * 64, rows=100, skipped=2, bytes=200, digest="e" * 64, seconds=0.25)
HIT_COUNTS = HitCounts(images=999, skipped=1, selected=80, text_rows=100, mean_score=0.3, digest="2" * 64)
STUDENT = StudentSpec(
    name="resnet18",
    vision_cfg={"timm_model_name": "resnet18", "image_size": 64, "nested": {"a": [1, None]}},
    embed_dim=768,
    image_size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    activation="gelu",
)
RUN = Run(
    config={"lr": 1e-3, "val": ["a", "b"]},
    student=STUDENT,
    teacher=TEACHER,
    images_identity="3" * 64,
    images_chunk_rows=512,
    texts_identity=None,
    pairs_digest="4" * 64,
    steps=100,
    versions={"torch": "2.6"},
)
SELECTION_PLAN = SelectionPlan(
    images="/data/images.zarr",
    images_identity="f" * 64,
    texts="/data/texts.zarr",
    texts_identity="0" * 64,
    pairs="/data/pairs.zarr",
    pairs_digest="2" * 64,
    settings=SelectionSettings(
        by="similarity", among=None, min_hits=None, min_score=4.5, pool=60, dedup=0.9, balance=True, size=20,
        images_sample=16384, seed=0,
    ),
)  # fmt: skip
TEXT_SELECTION = TextSelection(
    plan=SELECTION_PLAN,
    rows=100,
    kept=20,
    dropped={"below --min-score": 70, "beyond --size": 10},
    clusters=8,
    cap=3,
    sources=(SourceShare(file="a.txt", rows=100, kept=20),),
    histogram=Histogram(of="score", edges=(0.0, 1.5, 3.0), kept=(0, 20), dropped=(70, 10)),
    examples=(Example(group="kept", row=3, score=None, hits=0, file="a.txt", text="犬", like="a dog"),),
    digest="5" * 64,
)
IMAGE_SELECTION_PLAN = ImageSelectionPlan(
    images="/data/images.zarr",
    images_identity="f" * 64,
    images_data="e" * 64,
    settings=ImageSelectionSettings(
        by="near", near="d" * 64, near_data="c" * 64, near_sample=16384, drop_near=("犬",), drop_above=0.25,
        drop_data="b" * 64, exact=True, top=60, dedup=0.9, balance=True, size=20, seed=0,
    ),
)  # fmt: skip
IMAGE_SELECTION = ImageSelection(
    plan=IMAGE_SELECTION_PLAN,
    rows=100,
    kept=20,
    dropped={"repeated, by --dedup": 70, "beyond --size": 10},
    groups={"1": 19, "11 or more": 1},
    clusters=8,
    cap=3,
    sources=(SourceShare(file="/data/a.tar", rows=100, kept=20),),
    histogram=Histogram(of="score", edges=(0.0, 1.5, 3.0), kept=(0, 20), dropped=(70, 10)),
    digest="5" * 64,
    copies_digest="6" * 64,
)
LEAKS = Leaks(
    kind="image",
    store="/data/images.zarr",
    store_identity="f" * 64,
    store_data="e" * 64,
    asked="b" * 64,
    cosine=0.75,
    similarity=0.75,
    nearest=20,
    sets=(
        LeakedSet(
            title="cifar10",
            suite="elevater",
            digest="d" * 64,
            tested=9,
            leaked=1,
            candidates=7,
            unread=0,
            unreadable={"UNDECODABLE": 2},
        ),
    ),
    rows=1,
    digest="c" * 64,
)
RESULT = EvaluationResult(
    set="caltech101",
    suite="elevater",
    protocol="few-shot-5/honest/seed-0",
    metric="mean_per_class",
    metrics={"top1": 0.5, "mean_per_class": 0.25},
    intervals={"top1": (0.4, 0.6), "mean_per_class": (0.2, 0.3)},
    images=500,
    expected=6084,
    classes=102,
    unreadable=1,
    partial=("500 of 6084 images",),
    model={"name": "local-dir:犬", "weights": "7" * 64, "pretrained": None},
    digests={"images": "8" * 64},
    settings={"seed": 0, "decoder": "pillow"},
    versions={"torch": "2.6"},
    device="cpu",
    seconds=1.5,
    finished="2025-01-01T00:00:00+00:00",
    notes=("1 images could not be read",),
)
EXPORT = Export(
    format="onnx",
    model=TEACHER,
    text_tower="9" * 64,
    parameters=100,
    image_parameters=60,
    image_flops=1000,
    text_flops=None,
    versions={"torch": "2.6"},
    origin=ExportOrigin(
        student="ViT-B-32",
        teacher="ViT-L-14",
        teacher_weights="a" * 64,
        step=10,
        steps=100,
        weights="ema",
        images_seen=5120,
        seed=0,
        config={"lr": 0.1},
        sources=(ExportSource(kind="image", store="images.zarr", names=("a.tar",), rows=3, digest="1" * 64),),
        versions={"torch": "2.6"},
    ),
    onnx=OnnxFacts(opset=18, image_input="uint8", quantized={"vision_model.onnx": "static int8"}),
    checks={"cosine/images": 0.99999},
    files={"vision_model.onnx": "3" * 64},
)
LATENCY = Latency(
    machine=Machine(processor="a CPU", cores=2, instructions=("avx2",), system="Linux"),
    models=(
        ModelLatency(
            name="student",
            weights="a" * 64,
            backend="onnx",
            precision="fp32",
            device="cpu",
            threads=1,
            parameters=100,
            image_parameters=60,
            image_flops=1000,
            text_flops=None,
            bytes=400,
            memory=None,
            image=(Timing(batch=1, median_ms=1.5, p95_ms=2.0, spread=0.1, calls=10),),
            text=(),
            load=0.5,
            order=("student",),
            versions={"torch": "2.6"},
            finished="2025-01-01T00:00:00+00:00",
        ),
    ),
)
DOCUMENTS: list[Document] = [
    *(
        STORE,
        COMMIT,
        SIDECAR,
        PART,
        PAIRS,
        HIT_COUNTS,
        RUN,
        SELECTION_PLAN,
        TEXT_SELECTION,
        IMAGE_SELECTION_PLAN,
        LEAKS,
        IMAGE_SELECTION,
        RESULT,
        EXPORT,
        LATENCY,
    ),
]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)


def through_json(document: Document) -> Any:
    """The document as it comes back from a file."""
    return json.loads(json.dumps(document.to_json(), allow_nan=False))


def problems_of(kind: type[Document], raw: object) -> dict[str, str]:
    """Path to complaint of everything wrong in `raw`."""
    with pytest.raises(SchemaError) as caught:
        kind.parse(raw, "here.json")
    found = {problem.path: problem.what for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    assert "here.json" in str(caught.value)
    assert all(what in str(caught.value) for what in found.values())
    return found


def test_all_documents_are_tested() -> None:
    assert {type(document) for document in DOCUMENTS} == set(Document.__subclasses__())


@each_document
def test_a_document_is_read_back_as_it_was_written(document: Document) -> None:
    raw = through_json(document)
    assert list(raw)[:2] == ["schema", "version"]
    assert type(document).parse(raw, "here.json") == document


@each_document
def test_every_missing_field_is_reported_at_once(document: Document) -> None:
    found = problems_of(type(document), {"schema": document.SCHEMA, "version": document.VERSION})
    required = [f.name for f in dataclasses.fields(document) if f.default is f.default_factory is dataclasses.MISSING]
    assert found == dict.fromkeys(required, "missing")


@each_document
def test_a_document_in_which_one_value_has_changed_is_refused(document: Document) -> None:
    """Any value: each leaf is changed to another of its kind, as a flipped bit or an editor would."""
    raw = through_json(document)
    for name, value in raw.items():
        if isinstance(value, str) and name not in ("schema", "kind") and value:
            changed = raw | {name: value[:-1] + chr(ord(value[-1]) ^ 1)}
        elif isinstance(value, int) and name != "version":
            changed = raw | {name: value ^ (1 << 20)}
        else:
            continue
        assert problems_of(type(document), changed), name


def test_a_selection_must_account_for_every_sentence_and_every_bin() -> None:
    raw = through_json(TEXT_SELECTION)
    wrong = raw | {"kept": 21, "histogram": raw["histogram"] | {"kept": [1, 2, 3]}}
    assert problems_of(TextSelection, wrong) == {
        "histogram.kept": "expected 2 bins, found 3",
        "dropped": "with those kept adds up to 101 sentences, not to 100",
    }


def test_the_checksum_names_what_happened() -> None:
    found = problems_of(HitCounts, through_json(HIT_COUNTS) | {"selected": 81})
    assert found == {"checksum": "does not fit the rest: the document was damaged or edited by hand"}


@each_document
def test_an_unknown_version_is_refused_with_a_remedy(document: Document) -> None:
    later = document.VERSION + 1
    found = problems_of(type(document), through_json(document) | {"version": later, "what_it_has": 1})
    assert list(found) == ["version"]
    assert f"version {later} is not readable" in found["version"]
    assert "install the dimefm release that wrote it" in found["version"]


@each_document
def test_another_schema_is_refused(document: Document) -> None:
    found = problems_of(type(document), through_json(document) | {"schema": "dimefm.other"})
    assert found == {
        "schema": f"expected {document.SCHEMA!r}, found 'dimefm.other': look whether two paths were swapped"
    }


@each_document
def test_an_unknown_field_is_refused(document: Document) -> None:
    assert problems_of(type(document), through_json(document) | {"extra": 1}) == {"extra": "unknown field"}


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_what_is_no_object_is_refused(raw: object) -> None:
    assert problems_of(EmbeddingStore, raw) == {"": f"expected an object, found {raw!r}"}


def test_four_faults_give_four_problems_with_their_paths() -> None:
    raw = through_json(STORE)
    raw["rows"] = "many"
    raw["teacher"]["preprocessing"]["size"] = [224, 224, 3]
    raw["teacher"]["activation"] = "relu"
    del raw["source"]["digest"]
    assert problems_of(EmbeddingStore, raw) == {
        "rows": "expected an integer, found 'many'",
        "teacher.preprocessing.size": "expected 2 items, found 3",
        "teacher.activation": "expected one of 'gelu', 'quick_gelu', found 'relu'",
        "source.digest": "missing",
    }


def test_faults_within_lists_and_objects_have_their_place() -> None:
    raw = through_json(COMMIT)
    raw["failures"].append({**raw["failures"][0], "row": None, "colour": "red"})
    raw["counts"]["OK"] = 1.5
    raw["versions"]["torch"] = 2.6
    assert problems_of(Commit, raw) == {
        "failures[1].row": "expected an integer, found None",
        "failures[1].colour": "unknown field",
        "counts.OK": "expected an integer, found 1.5",
        "versions.torch": "expected a string, found 2.6",
    }


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("rows", True, "expected an integer, found True"),
        ("rows", 3.0, "expected an integer, found 3.0"),
        ("kind", "video", "expected one of 'image', 'text', found 'video'"),
        ("teacher", None, "expected an object, found None"),
        ("teacher.name", 3, "expected a string, found 3"),
        ("teacher.pretrained", 3, "expected a string, found 3"),
        ("teacher.logit_scale", "100", "expected a number, found '100'"),
        ("teacher.logit_scale", False, "expected a number, found False"),
        ("teacher.logit_bias", [], "expected a number, found []"),
        ("teacher.preprocessing.mean", 0.5, "expected a list, found 0.5"),
        ("source.arguments", "images/", "expected a list, found 'images/'"),
        ("source.dropped", [], "expected an object, found []"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(path: str, value: object, what: str) -> None:
    raw = through_json(STORE)
    *parents, name = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[name] = value
    assert problems_of(EmbeddingStore, raw) == {path: what}


def test_a_long_value_is_shown_in_short() -> None:
    raw = through_json(HIT_COUNTS) | {"images": "x" * 1000}
    assert len(problems_of(HitCounts, raw)["images"]) < 100


def test_numbers_without_a_point_are_read_as_floats() -> None:
    raw = {name: value for name, value in through_json(COMMIT).items() if name != "checksum"} | {"seconds": 2}
    raw["checksum"] = digest_of(raw)
    seconds = Commit.parse(raw, "here.json").seconds
    assert seconds == 2.0
    assert isinstance(seconds, float)


@pytest.mark.parametrize(
    ("document", "change", "paths"),
    [
        (STORE, {"rows": 0, "chunk_rows": 0}, {"rows", "chunk_rows"}),
        (STORE, {"dim": 0}, {"dim"}),
        (STORE, {"dim": 512}, {"dim"}),
        (STORE, {"shard_rows": 100}, {"shard_rows"}),
        (STORE, {"shard_rows": 0, "dim": 512}, {"shard_rows", "dim"}),
        (STORE, {"batch_size": 0}, {"batch_size"}),
        (COMMIT, {"counts": {"OK": 255}}, {"counts", "failures"}),
        (COMMIT, {"stop": 300}, {"counts"}),
        (COMMIT, {"failures": []}, {"failures"}),
        (
            PAIRS,
            {"top_k": 0, "rows": -1, "text_rows": 0, "shard_rows": 0},
            {"top_k", "rows", "text_rows", "shard_rows"},
        ),
    ],
)
def test_problems_between_fields_are_reported(document: Document, change: dict[str, object], paths: set[str]) -> None:
    assert paths <= set(problems_of_any(document, change))


def problems_of_any(document: Document, change: dict[str, object]) -> list[str]:
    with pytest.raises(SchemaError) as caught:
        type(document).parse(through_json(document) | change, "here.json")
    return [problem.path for problem in caught.value.problems]


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_recall_outside_zero_to_one_is_refused_by_its_place(value: float) -> None:
    raw = through_json(SIDECAR)
    raw["recall"].append({"k": 1, "queries": 10, "source": "image", "value": value})
    assert list(problems_of(IndexSidecar, raw)) == ["recall[1].value"]


def test_parse_dataclass_reports_every_problem() -> None:
    with pytest.raises(SchemaError) as caught:
        parse_dataclass(Recall, {"k": "ten", "value": None, "more": 1}, "recall.json")
    assert {problem.path for problem in caught.value.problems} == {"k", "value", "more", "queries", "source"}


# -- any valid document -----------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**12)
preprocessings = st.builds(
    Preprocessing,
    size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    mean=st.tuples(finite, finite, finite),
    std=st.tuples(finite, finite, finite),
    interpolation=st.sampled_from(["bicubic", "bilinear", "random"]),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    fill_color=st.integers(0, 255),
)
teachers = st.builds(
    TeacherIdentity,
    name=names,
    pretrained=st.none() | names,
    weights=names,
    activation=st.sampled_from(["gelu", "quick_gelu"]),
    preprocessing=preprocessings,
    tokenizer=names,
    context_length=st.integers(1, 512),
    embed_dim=st.integers(1, 4096),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    logit_scale=finite,
    logit_bias=st.none() | finite,
)
sources = st.builds(
    SourceSummary,
    arguments=st.lists(names).map(tuple),
    files=counts,
    bytes=counts,
    digest=names,
    repeated_keys=counts,
    dropped=st.dictionaries(names, counts),
    problems=st.lists(names).map(tuple),
    settings=st.dictionaries(names, counts | names),
)
strong_views = st.builds(StrongViews, operations=st.integers(0, 16), magnitude=st.integers(0, 10))
view_plans = st.builds(
    ViewPlan,
    count=st.integers(1, 9),
    seed=counts,
    crop_scale=st.tuples(finite, finite),
    flip=st.booleans(),
    strong=st.none() | strong_views,
    mixup=st.sampled_from([0.0, 0.2]),
    first=st.integers(0, 9),
)


@st.composite
def stores(draw: st.DrawFn) -> EmbeddingStore:
    teacher, chunk_rows = draw(teachers), draw(st.integers(1, 5000))
    kind = draw(st.sampled_from(["image", "text"] if teacher.has_text else ["image"]))
    return EmbeddingStore(
        kind=kind,
        rows=draw(st.integers(1, 10**11)),
        dim=teacher.embed_dim,
        chunk_rows=chunk_rows,
        shard_rows=chunk_rows * draw(st.integers(1, 64)),
        batch_size=draw(st.integers(1, 10**5)),
        teacher=teacher,
        source=draw(sources),
        views=draw(st.none() | view_plans) if kind == "image" else None,
        pixels=draw(st.none() | st.integers(8, 512)) if kind == "image" else None,
    )


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    failures = st.builds(Failure, row=counts, key=names, file=names, status=st.just("EMPTY"), reason=names)
    failed, good, start = draw(st.lists(failures, max_size=4)), draw(st.integers(0, 10**6)), draw(counts)
    return Commit(
        shard=draw(counts),
        start=start,
        stop=start + good + len(failed),
        counts={"OK": good, "EMPTY": len(failed)},
        failures=tuple(failed),
        digest=draw(names),
        device=draw(names),
        seconds=draw(finite),
        finished=draw(names),
        versions=draw(st.dictionaries(names, names)),
    )


@settings(max_examples=60, deadline=None)
@given(stores() | commits())
def test_any_valid_document_is_read_back_from_its_text(document: Document) -> None:
    raw = json.loads(json.dumps(document.to_json(), ensure_ascii=False, allow_nan=False))
    assert type(document).parse(raw, "here.json") == document


@settings(max_examples=60, deadline=None)
@given(stores())
def test_the_shards_of_any_store_cover_its_rows_once(store: EmbeddingStore) -> None:
    shards = sorted({0, store.shards // 2, max(0, store.shards - 2), store.shards - 1})
    for shard in shards:
        start, stop = store.shard_range(shard)
        assert start == shard * store.shard_rows
        assert 0 < stop - start <= store.shard_rows
    assert store.shard_range(store.shards - 1)[1] == store.rows


# -- views ------------------------------------------------------------------------------------------------------------


def test_a_store_of_crops_is_written_and_named_as_before_there_were_strong_views() -> None:
    plan = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True)
    store = dataclasses.replace(STORE, kind="image", views=plan)
    before = {"count": 2, "seed": 0, "crop_scale": [0.4, 1.0], "flip": True}
    assert store.to_json()["views"] == before
    assert digest_of(plan) == digest_of(before)
    assert store.arrays()["view"].shape == (STORE.rows, 2, 5)
    others = [{"strong": StrongViews()}, {"mixup": 0.2}, {"strong": StrongViews(magnitude=5)}]
    changed = [dataclasses.replace(store, views=dataclasses.replace(plan, **one)) for one in others]
    assert len({store.identity, *(one.identity for one in changed)}) == 4
    assert [one.arrays()["view"].shape[-1] for one in changed] == [5 + 4 + 3, 2 * 5 + 2, 5 + 4 + 3]


def test_a_store_of_operations_that_are_not_known_here_is_refused() -> None:
    plan = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True, strong=StrongViews(version=2))
    document = dataclasses.replace(STORE, kind="image", views=plan).to_json()
    with pytest.raises(SchemaError, match=r"views\.strong\.version: 2 is not known here"):
        EmbeddingStore.parse(document, "zarr.json")


# -- identity ---------------------------------------------------------------------------------------------------------


def test_every_field_of_a_teacher_but_its_place_counts() -> None:
    changes: dict[str, Any] = {
        "weights": "b" * 64,
        "activation": "gelu",
        "preprocessing": dataclasses.replace(PREPROCESSING, resize_mode="squash"),
        "tokenizer": "Other",
        "context_length": 32,
        "embed_dim": 512,
        "precision": "bf16",
        "logit_scale": 50.0,
        "logit_bias": -10.0,
    }
    assert {*changes, "name", "pretrained", "preprocessing_from"} == {
        field.name for field in dataclasses.fields(TeacherIdentity)
    }
    for name, value in changes.items():
        other = dataclasses.replace(TEACHER, **{name: value})
        assert [line.partition(":")[0] for line in TEACHER.differences(other)] == [name]
        assert dataclasses.replace(STORE, teacher=other).identity != STORE.identity
    moved = dataclasses.replace(TEACHER, name="local-dir:/elsewhere", pretrained=None, preprocessing_from="x")
    assert TEACHER.differences(moved) == []
    assert dataclasses.replace(STORE, teacher=moved).identity == STORE.identity


def test_a_store_of_another_kind_or_source_has_another_identity() -> None:
    other_source = dataclasses.replace(SOURCE, digest="5" * 64)
    identities = {
        STORE.identity,
        dataclasses.replace(STORE, kind="text").identity,
        dataclasses.replace(STORE, source=other_source).identity,
    }
    assert len(identities) == 3


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": (2, 3)}) == digest_of({"b": [2, 3], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_status_codes_never_change() -> None:
    names = ["PENDING", "OK", "MISSING", "EMPTY", "TRUNCATED", "UNDECODABLE", "TOO_LARGE", "NOT_FINITE", "CRASHED"]
    assert [(status.name, status.value) for status in Status] == [(name, i) for i, name in enumerate(names)]


# -- the plan ---------------------------------------------------------------------------------------------------------


def image_plan(start: int, stop: int) -> pa.Table:
    rows = list(range(start, stop))
    columns = {"row": rows, "key": [f"k{r}" for r in rows], "file": ["/a.tar"] * len(rows)}
    return pa.table({**columns, "offset": rows, "size": rows}, schema=IMAGE_PLAN)


def plan_problems(table: pa.Table, kind: str, start: int, stop: int) -> dict[str, str]:
    with pytest.raises(SchemaError) as caught:
        parse_plan(table, kind, start, stop, "rows/000001.parquet")
    assert "rows/000001.parquet" in str(caught.value)
    return {problem.path: problem.what for problem in caught.value.problems}


def test_a_valid_plan_is_given_back() -> None:
    table = image_plan(32, 64)
    assert parse_plan(table, "image", 32, 64, "here") is table
    texts = pa.table({"row": [0], "key": ["a"], "text": ["b"]}, schema=TEXT_PLAN)
    assert parse_plan(texts, "text", 0, 1, "here") is texts


def test_rows_of_another_shard_or_order_are_refused() -> None:
    assert plan_problems(image_plan(0, 32), "image", 32, 64) == {"row": "must count from 32 to 63 in order"}
    backwards = image_plan(0, 4).take([3, 2, 1, 0])
    assert plan_problems(backwards, "image", 0, 4) == {"row": "must count from 0 to 3 in order"}


def test_a_plan_of_the_wrong_length_is_refused() -> None:
    assert plan_problems(image_plan(0, 31), "image", 0, 32) == {"row": "expected 32 rows, found 31"}


def test_missing_and_mistyped_columns_are_reported_at_once() -> None:
    table = image_plan(0, 4).drop_columns(["file"])
    place = table.schema.get_field_index("size")
    table = table.set_column(place, "size", table["size"].cast(pa.int32()))
    assert plan_problems(table, "image", 0, 5) == {
        "file": "missing column",
        "size": "expected int64, found int32",
        "row": "expected 5 rows, found 4",
    }


def test_a_plan_of_the_other_kind_is_refused() -> None:
    assert plan_problems(image_plan(0, 4), "text", 0, 4) == {"text": "missing column"}


def test_each_status_says_where_it_is_decided() -> None:
    """Below each code stands a line, and the functions that it names exist: room, file, function or class."""
    root = Path(__file__).parents[2]
    source = (root / "cache_schemas" / "embedding_store.py").read_text(encoding="utf-8")
    (body,) = (n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Status")
    lines = {
        node.targets[0].id: ast.unparse(below)
        for node, below in itertools.pairwise(body)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(below, ast.Expr)
    }
    assert list(lines) == [status.name for status in Status]
    lines["Status"] = ast.unparse(body[0])
    for name, line in lines.items():
        places = re.findall(r"`(\w+)\.(\w+)\.(\w+)`", line)
        assert places or name == "PENDING"
        for room, file, function in places:
            text = (root / "dimefm" / room / f"{file}.py").read_text(encoding="utf-8")
            assert re.search(rf"^(def|class) {function}\b", text, re.MULTILINE), f"{name}: {room}.{file}.{function}"
