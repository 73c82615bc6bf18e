"""The check after writing: what it reads, what it measures, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dimefm.errors import DimefmError, TeacherError
from dimefm.export.check import check, class_cosines, top1
from dimefm.export.check_material import Material, find_material
from dimefm.export.config import ExportConfig
from dimefm.export.export_student import export
from dimefm.models.clip import load_clip
from dimefm.store.embedding_store import Store
from dimefm.training.run_folder import read_run
from dimefm.training.train import train
from tests.tiny_clip import write_clip
from tests.tiny_training import tiny_config


@pytest.fixture(scope="module")
def run(
    image_store: Store, text_store: Store, cifar10: str, prompt_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of one step with a --val set."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_config(image_store, text_store, out, max_steps=1, epochs=1, val=(cifar10,), val_texts=prompt_store.path))
    return out


def config(source: Path | str, **options: object) -> ExportConfig:
    return ExportConfig(source=str(source), out="out", **{"format": "onnx", **options})  # type: ignore[arg-type]


def test_a_run_is_checked_on_what_it_was_trained_and_validated_on(run: Path, image_store: Store) -> None:
    found = find_material(config(run))
    assert (len(found.images), len(found.texts)) == (64, 128)
    assert len(set(found.images)) == 64
    assert [(images.name, len(images.samples)) for images in found.labelled] == [("cifar10", 200)]
    assert find_material(config(run)).images == found.images


def test_a_run_whose_images_are_gone_names_check_on(
    image_store: Store, text_store: Store, cifar10: str, tmp_path: Path
) -> None:
    shutil.copytree(image_store.path, tmp_path / "images.zarr")
    train(tiny_config(Store(str(tmp_path / "images.zarr")), text_store, tmp_path / "run", max_steps=1, epochs=1))
    with pytest.raises(DimefmError, match=r"has no --val set\n  remedy: give --check-on SET"):
        find_material(config(tmp_path / "run", int8=True))
    shutil.rmtree(tmp_path / "images.zarr")
    with pytest.raises(DimefmError, match=r"cannot be read now: .*images.zarr(?s:.*)remedy: give --check-on SET"):
        find_material(config(tmp_path / "run"))
    found = find_material(config(tmp_path / "run", check_on=(cifar10,)))
    assert (len(found.images), len(found.texts), len(found.labelled)) == (64, 128, 1)


def test_a_run_that_moved_with_its_stores_finds_them(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path / "before")
    for store in (image_store, text_store):
        shutil.copytree(store.path, Path(store.path).name)
    stores = (Store(Path(store.path).name) for store in (image_store, text_store))
    plain = tiny_config(*stores, Path("runs/one"), max_steps=1, epochs=1)
    train(replace(plain, images="images.zarr", texts="texts.zarr"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before").rename(tmp_path / "after")
    assert len(find_material(config("after/runs/one")).images) == 64


@pytest.fixture(scope="module")
def few(cifar10: str) -> Material:
    """40 labelled images, and a few of everything else."""
    found = find_material(config("any", check_on=(cifar10,)))
    (labelled,) = found.labelled
    labelled = replace(labelled, samples=labelled.samples[:40], labels=labelled.class_labels[:40])
    return Material(found.images[:8], found.texts[:8], (labelled,))


def test_another_model_is_refused_with_the_figures(few: Material, tmp_path: Path) -> None:
    """Of models that have one tower in common, the figures say which is another."""
    one = load_clip(f"local-dir:{write_clip(tmp_path / 'one', scale=3)}", device="cpu")
    same = check(one, tmp_path / "one", few, config("one"))
    assert same["image_cosine"] == pytest.approx(1)
    assert same["top1/cifar10"] == same["pytorch_top1/cifar10"] == top1(one, few.labelled[0])
    assert (same["images"], same["texts"], same["images/cifar10"]) == (8, 8, 40)
    for kind, other in (("image", "text"), ("text", "image")):
        seeds = {f"{kind}_seed": 1}
        write_clip(tmp_path / kind, scale=3, **seeds)
        with pytest.raises(DimefmError, match=f"smallest cosine of {kind}s of") as caught:
            check(one, tmp_path / kind, few, config("one"))
        assert f"cosine of {other}s" not in str(caught.value)
        assert "another class for" in str(caught.value)


def test_int8_may_lose_no_more_than_asked_for(few: Material, tmp_path: Path) -> None:
    """Labels are what the first model answers, so that it is always right and another model loses."""
    one = load_clip(f"local-dir:{write_clip(tmp_path / 'one', scale=3)}", device="cpu")
    write_clip(tmp_path / "other", image_seed=1, scale=3)
    labels = class_cosines(one, few.labelled[0]).argmax(axis=1)
    material = replace(few, labelled=(replace(few.labelled[0], labels=labels),))
    with pytest.raises(
        DimefmError, match=r"--int8 loses \d+\.\d\d points, more than 1: top-1 100\.0 -> \d+\.\d on cifar10"
    ):
        check(one, tmp_path / "other", material, config("one", int8=True))
    for options in ({"accept": True}, {"max_loss": 100}):
        assert check(one, tmp_path / "other", material, config("one", int8=True, **options))["top1/cifar10"] < 0.9


def test_a_model_folder_is_checked_on_the_sample(tmp_path: Path) -> None:
    found = find_material(config(write_clip(tmp_path / "one")))
    assert [images.name for images in found.labelled] == ["caltech101", "cifar10"]
    assert max(len(images.samples) for images in found.labelled) == 200
    assert len(found.texts) == 128


def test_an_unfinished_run_is_exported_and_named_as_such(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(str(run), str(tmp_path / "student"))
    assert "unfinished" not in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")
    document = replace(read_run(str(run)), steps=7)
    (tmp_path / "run" / "run.json").write_text(json.dumps(document.to_json()))
    export(str(tmp_path / "run"), str(tmp_path / "other"))
    assert "is unfinished: it has done 1 of 7 steps" in capsys.readouterr().err


def test_a_run_whose_teacher_is_gone_says_how_to_name_it(run: Path, tmp_path: Path, teacher_name: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = read_run(str(run))
    moved = replace(before, teacher=replace(before.teacher, name=f"local-dir:{tmp_path / 'gone'}"))
    (tmp_path / "run" / "run.json").write_text(json.dumps(moved.to_json()))
    with pytest.raises(TeacherError, match=r"(?s)the teacher of .*run cannot be loaded.*--teacher"):
        export(str(tmp_path / "run"), str(tmp_path / "student"))
    export(str(tmp_path / "run"), str(tmp_path / "student"), teacher=teacher_name)
