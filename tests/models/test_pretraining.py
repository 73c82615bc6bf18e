"""Weights that do not say how they were trained: from tags that agree, from the user, or refused; never guessed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from click.testing import CliRunner, Result
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from cache_schemas import EmbeddingStore
from cache_schemas.run import CONFIG_FILE
from dimefm.caching.worker import Job, Worker
from dimefm.cli import cli
from dimefm.errors import MismatchError, SourceError, TeacherError, TrainingError
from dimefm.evaluation.open_model import open_model
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models import strict_open_clip
from dimefm.models.authors_checkpoint import convert
from dimefm.models.clip import load_clip
from dimefm.models.first_weights import fit_to_first_weights
from dimefm.models.pretraining import facts_of_weights
from dimefm.models.towers import notes_on_preparation, student_preprocessing, student_spec
from dimefm.models.trained import Trained
from dimefm.retrieval.search import search
from dimefm.store.embedding_store import Store
from dimefm.training.config import LossConfig
from dimefm.training.recipes import sample
from dimefm.training.run_folder import open_inputs, plan_run, write_run
from pipeline.cache import CacheConfig, cache
from tests.stores import teacher_identity
from tests.system.test_named_paths import changed
from tests.tiny_clip import CONFIG, write_clip
from tests.tiny_training import tiny_config

HALF = (0.5, 0.5, 0.5)
OPENAI = {
    "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip
SIGLIP = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
SAID = Trained(mean=HALF, std=HALF, interpolation="bilinear", resize_mode="squash")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of weights of two small architectures: `tiny`, of which open_clip knows no weights, and `tagged`, whose
    two tags agree on all but the standard deviation."""
    tags = {"a": {**SIGLIP, "std": (0.25,) * 3}, "b": SIGLIP}
    for name in ("tiny", "tagged"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, CONFIG)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tagged", tags)
    path = tmp_path / "weights.pt"
    torch.save(open_clip.CLIP(**CONFIG).state_dict(), path)
    return str(path)


def preparing(teacher: Any) -> dict[str, Any]:
    return {field: getattr(teacher.preprocessing, field) for field in SIGLIP}


# -- what open_clip knows of an architecture --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "origin"),
    [
        ("ViT-B-16-SigLIP", SIGLIP, "the only tag of ViT-B-16-SigLIP"),
        ("ViT-L-14-quickgelu", OPENAI, "all 4 tags of ViT-L-14-quickgelu"),
        ("roberta-ViT-B-32", OPENAI, "the only tag of roberta-ViT-B-32"),  # with the only activation that there is
    ],
)
def test_tags_that_agree_say_it(weights: str, name: str, expected: dict[str, Any], origin: str) -> None:
    facts = facts_of_weights(name, weights, Trained())
    assert (facts.preprocessing, facts.origin) == (expected, origin)


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("ViT-S-32", Trained(), r"no weights of ViT-S-32 to compare with(?s:.*)--mean R,G,B --std R,G,B --interpolat"),
        ("ViT-L-14", Trained(), r"mean 0\.48(?s:.*)0\.5,0\.5,0\.5 \(laion2b_s32b_b82k\)(?s:.*)--activation gelu"),
        ("ViT-H-14-quickgelu", Trained(), r"resize_mode shortest \(metaclip_fullcc\) or squash \(dfn5b\)"),
        ("ViT-B-32", Trained(), "activation: ViT-B-32 has GELU, known weights also QuickGELU.*openai(?s:.*)-quickgelu"),
        ("RN50", Trained(assume_openai=True), "name RN50-quickgelu"),
        ("ViT-B-32", Trained(activation="quick_gelu"), "does not use(?s:.*)name ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", Trained(activation="gelu"), "trained with GELU(?s:.*)name ViT-B-32$"),
    ],
)
def test_what_does_not_follow_is_asked_for(weights: str, name: str, said: Trained, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        facts_of_weights(name, weights, said)


def test_the_word_of_the_user_comes_before_the_tags(weights: str) -> None:
    said = Trained(mean=HALF, std=HALF, activation="gelu")
    facts = facts_of_weights("ViT-L-14", weights, said)
    assert facts.preprocessing == {**OPENAI, "mean": HALF, "std": HALF}
    assert facts.origin == "the user (mean, std); all 12 tags of ViT-L-14 (interpolation, resize_mode)"
    facts = facts_of_weights("ViT-B-16-SigLIP", weights, Trained(assume_openai=True))
    assert (facts.preprocessing, facts.origin) == (OPENAI, "assumed to be OpenAI's")


@pytest.mark.parametrize("values", [{"mean": (123.7, 116.3, 103.5)}, {"std": (0.2, 0.0, 0.2)}])
def test_colours_go_from_0_to_1(values: dict[str, Any]) -> None:
    with pytest.raises(TeacherError, match="is not for colours from 0 to 1"):
        Trained(**values)


def test_a_tag_is_not_refused_for_want_of_another_architecture() -> None:
    strict_open_clip._check_activation("roberta-ViT-B-32", "laion2b_s12b_b32k")
    with pytest.raises(TeacherError, match="use --teacher ViT-B-32-quickgelu"):
        load_clip("ViT-B/32", "openai", device="cpu")  # as OpenAI writes it


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_file_is_loaded_with_what_is_known_of_it(weights: str) -> None:
    with pytest.raises(TeacherError, match="does not say how images were prepared"):
        load_clip("tiny", weights, device="cpu")
    teacher = load_clip("tiny", weights, trained=SAID, device="cpu").identity
    assert (teacher.preprocessing.mean, teacher.preprocessing.std) == (HALF, HALF)
    assert (teacher.preprocessing.interpolation, teacher.preprocessing.resize_mode) == ("bilinear", "squash")
    assert (teacher.preprocessing.size, teacher.preprocessing_from) == ((32, 32), "the user")
    teacher = load_clip("tagged", weights, trained=Trained(std=HALF), device="cpu").identity
    assert preparing(teacher) == SIGLIP
    assert teacher.preprocessing_from == "the user (std); all 2 tags of tagged (mean, interpolation, resize_mode)"
    teacher = load_clip("tagged", weights, trained=Trained(assume_openai=True), device="cpu").identity
    assert preparing(teacher) == OPENAI


def test_a_config_must_say_the_mean_too(tmp_path: Path) -> None:
    name = f"local-dir:{write_clip(tmp_path / 'model')}"
    assert load_clip(name, device="cpu").identity.preprocessing_from == "its config"
    with pytest.raises(TeacherError, match="--mean: its config says that itself"):
        load_clip(name, trained=Trained(mean=HALF), device="cpu")
    path = tmp_path / "model" / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "preprocess_cfg": {"std": HALF}}))
    with pytest.raises(TeacherError, match=r"its config has no mean(?s:.*)--mean R,G,B, or --assume-openai"):
        load_clip(name, device="cpu")
    teacher = load_clip(name, trained=Trained(mean=HALF), device="cpu").identity
    assert preparing(teacher) == {**OPENAI, "mean": HALF, "std": HALF}
    expected = "its config (std); the user (mean); open_clip's default (interpolation, resize_mode)"
    assert teacher.preprocessing_from == expected
    path.write_text(json.dumps({**config, "preprocess_cfg": {"mean": HALF, "std": HALF}}))  # as many at the Hub
    assert load_clip(name, device="cpu").identity.preprocessing_from == "its config"


def test_a_store_says_what_its_weights_do_not(weights: str, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("a cat\na dog\n")
    words: dict[str, Any] = {"kind": "text", "sources": (str(tmp_path / "s.txt"),), "out": str(tmp_path / "t.zarr")}
    config = CacheConfig(**words, teacher="tiny", pretrained=weights, device="cpu", workers=1)
    with pytest.raises(TeacherError, match="does not say how images were prepared"):
        cache(config)
    assert not (tmp_path / "t.zarr").exists()
    before = cache(replace(config, trained=SAID)).schema
    assert before.teacher.preprocessing_from == "the user"
    with pytest.raises(MismatchError, match="preprocessing"):
        cache(replace(config, trained=Trained(assume_openai=True)))
    path = str(tmp_path / "t.zarr")
    for named in ({}, {"teacher": "tiny", "pretrained": weights}):
        (hits,) = search(path, texts=["a cat"], **named)
        assert hits[0].entry["text"] == "a cat"
        assert verify(VerifyConfig(store=path, sample=2, **named)).trusted
    as_before_it_was_recorded(tmp_path / "t.zarr")
    for commit in (tmp_path / "t.zarr" / "commits").iterdir():
        commit.unlink()  # there is work left
    worker = Worker(Job(store=path, teacher="tiny", pretrained=weights, precision="fp32", device="cpu", threads=1))
    worker.start(1, 0)  # as on Ray: told no more than the store says
    after = cache(config).schema
    assert (after.identity, after.teacher.preprocessing_from) == (before.identity, None)


def as_before_it_was_recorded(store: Path) -> None:
    path = store / "zarr.json"
    document = json.loads(path.read_text())
    key = next(key for key, value in document["attributes"].items() if "teacher" in value)
    raw = document["attributes"][key]
    del raw["teacher"]["preprocessing_from"]
    document["attributes"][key] = changed(raw, teacher=raw["teacher"])
    path.write_text(json.dumps(document))
    assert isinstance(Store(str(store)).schema, EmbeddingStore)


# -- every command that takes weights ---------------------------------------------------------------------------------


def typed(*words: str) -> Result:
    return CliRunner().invoke(cli, [*words])


def test_the_commands_take_the_users_word(weights: str, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("a cat\na dog\n")
    words = (
        "cache-texts",
        str(tmp_path / "s.txt"),
        "--out",
        str(tmp_path / "t.zarr"),
        "--dry-run",
        "--teacher",
        "tiny",
    )
    found = typed(*words, "--pretrained", weights)
    assert (found.exit_code, "--assume-openai" in found.output) == (1, True), found.output
    found = typed(*words, "--pretrained", weights, "--assume-openai")
    assert (found.exit_code, "assumed to be OpenAI's" in found.output) == (0, True), found.output
    assert typed(*words, "--pretrained", weights, "--mean", "0.5,0.5").exit_code == 2
    found = typed(*words[:-1], "local-dir:/x", "--pretrained", weights)
    assert (found.exit_code, "--pretrained has no effect with local-dir:/x" in found.output) == (2, True)
    for command in ("cache-images", "import-embeddings", "evaluate", "convert-checkpoint"):
        assert "--assume-openai" in typed(command, "--help").output


def test_a_model_is_evaluated_with_the_users_word(weights: str, tmp_path: Path) -> None:
    with open_model("tiny", weights, trained=SAID, device="cpu") as opened:
        assert opened.identity.preprocessing.resize_mode == "squash"
    with pytest.raises(TeacherError), open_model("tiny", weights, device="cpu"):
        pass
    with pytest.raises(SourceError):
        convert(weights, str(tmp_path / "out"), teacher="tiny", pretrained=weights, trained=SAID)


# -- first weights of a student ---------------------------------------------------------------------------------------


def student(name: str, **teacher: Any) -> Any:
    return student_spec(name, teacher_identity(**{"activation": "quick_gelu", **teacher}))


def test_a_student_keeps_the_colours_of_its_first_weights() -> None:
    spec = student("resnet18")
    found = fit_to_first_weights(spec, "timm")
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "mean is (0.485, 0.456, 0.406), that of its first" in notes_on_preparation(found, [teacher_identity()])[0]
    found = fit_to_first_weights(
        student("ViT-B-16-SigLIP"), "webli"
    )  # whose tower is timm's, without open_clip's activation
    assert (found.mean, found.std) == (HALF, HALF)
    assert fit_to_first_weights(spec, "nowhere.pt") == spec


def test_first_weights_of_another_activation_are_refused() -> None:
    spec = student("ViT-B-16")
    assert fit_to_first_weights(spec, "openai").mean == OPENAI_DATASET_MEAN
    message = r"laion400m_e32 was trained with gelu(?s:.*)quick_gelu \(openai, dfn2b, metaclip_400m, metaclip_fullcc\)"
    with pytest.raises(TrainingError, match=message):
        fit_to_first_weights(spec, "laion400m_e32")
    assert fit_to_first_weights(replace(spec, activation="gelu"), "laion400m_e32").activation == "gelu"
    fit_to_first_weights(student("roberta-ViT-B-32"), "laion2b_s12b_b32k")


def test_first_weights_in_a_file_are_asked_about(weights: str) -> None:
    assert fit_to_first_weights(student("resnet18"), weights).mean == (0.485, 0.456, 0.406)
    with pytest.raises(TrainingError, match=r"with which activation(?s:.*)--set init_activation=gelu or quick_gelu"):
        fit_to_first_weights(student("ViT-B-16"), weights)
    assert fit_to_first_weights(student("ViT-B-16"), weights, activation="quick_gelu", mean=HALF).mean == HALF
    with pytest.raises(TrainingError, match="was trained with gelu"):
        fit_to_first_weights(student("ViT-B-16"), weights, activation="gelu")
    with pytest.raises(TrainingError, match=r"mean and std and activation(?s:.*)init_mean=\[R,G,B\]"):
        fit_to_first_weights(student("ViT-L-14"), weights)
    with pytest.raises(TrainingError, match="init_activation: no effect"):
        fit_to_first_weights(student("resnet18"), weights, activation="gelu")


def test_first_weights_in_a_folder_bring_their_config(tmp_path: Path, weights: str) -> None:
    folder = write_clip(tmp_path / "model")
    spec = student("tiny", activation="gelu")
    assert fit_to_first_weights(spec, folder).std == (0.25,) * 3
    with pytest.raises(TrainingError, match="was trained with gelu"):
        fit_to_first_weights(student("tiny"), folder)
    with pytest.raises(TrainingError, match="init_std: no effect"):
        fit_to_first_weights(spec, folder, std=HALF)
    (tmp_path / "model" / CONFIG_FILE).unlink()
    with pytest.raises(TrainingError, match="does not say with which mean and std and activation"):
        fit_to_first_weights(spec, folder)


def test_a_run_begins_with_them_and_goes_on_as_it_began(
    image_store: Store, text_store: Store, tmp_path: Path, weights: str
) -> None:
    folder, other = write_clip(tmp_path / "model"), (0.3, 0.3, 0.3)  # than the teacher's
    path = tmp_path / "model" / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "preprocess_cfg": {"mean": HALF, "std": other}}))
    words: dict[str, Any] = {"loss": LossConfig(vl=0.0, pvl=0.0, cosine=1.0), "batch_size": 8}
    config = tiny_config(image_store, text_store, tmp_path / "run", student="tiny", init=folder, max_steps=1, **words)
    inputs = open_inputs(config)
    plan: dict[str, Any] = {"machine": "m", "processes": 1, "order": "blocks"}
    begun = plan_run(config, inputs, 1, allow_changes=(), done=0, **plan)
    write_run(config.out, begun)
    assert (begun.student.mean, begun.student.std) == (HALF, other)
    assert student_preprocessing(begun.student).std == other  # as it is validated and exported
    path.unlink()  # what it began with is not asked about again
    longer = replace(config, max_steps=2)
    again = plan_run(longer, inputs, 2, allow_changes=("max_steps",), done=1, **plan)
    assert (again.student, again.steps) == (begun.student, 2)


def test_a_student_squashes_where_its_teacher_does() -> None:
    squashing = teacher_identity(preprocessing=replace(teacher_identity().preprocessing, resize_mode="squash"))
    spec = student_spec("resnet18", squashing)
    assert student_preprocessing(spec).resize_mode == "squash"
    assert notes_on_preparation(spec, [squashing]) == []
    longest = replace(squashing, preprocessing=replace(squashing.preprocessing, resize_mode="longest"))
    spec = student_spec("resnet18", longest)
    assert student_preprocessing(spec).resize_mode == "shortest"
    assert "by longest: crops have no borders" in notes_on_preparation(spec, [longest])[0]
    with pytest.raises(TrainingError, match="init_mean: no effect without init"):
        replace(sample("i", "t", "o"), init_mean=HALF)
