"""Where an export says it comes from: its run and stores, and nothing of the machine that it was made on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cache_schemas.export import EXPORT_FILE
from dimefm.export.export_student import export
from dimefm.export.origin import origin_of, public
from dimefm.models.exported import read_export
from dimefm.store.embedding_store import Store
from dimefm.training.run_folder import read_run, write_run
from dimefm.training.train import train
from tests.tiny_training import tiny_config


@pytest.fixture(scope="module")
def run(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_config(image_store, text_store, out, max_steps=2, epochs=1))
    return out


def test_an_export_says_what_its_student_was_distilled_from_and_on(run: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "student", tmp_path / "again"
    export(str(run), str(out))
    origin, document = read_export(str(out)).origin, read_run(str(run))
    assert origin is not None
    assert (origin.student, origin.step, origin.steps, origin.images_seen) == ("test_resnet", 2, 2, 32)
    assert (origin.teacher, origin.teacher_weights) == ("local-dir:tiny", document.teacher.weights)
    images, texts = origin.sources
    assert (images.names, images.rows, images.digest) == (("images-00000.tar",), 96, document.images_data)
    assert (texts.store, texts.names, texts.rows) == ("texts.zarr", ("sentences.txt",), 200)
    export(str(out), str(again))
    assert read_export(str(again)).origin == origin


def test_an_export_holds_no_path_of_this_machine(run: Path, tmp_path: Path, teacher_name: str) -> None:
    out = tmp_path / "student"
    export(str(run), str(out))
    private = [str(tmp_path.parent), str(run.parent), Path(teacher_name.removeprefix("local-dir:")).parent.as_posix()]
    for file in out.iterdir():
        content = file.read_bytes()
        assert not [path for path in private if path.encode() in content], file.name


def test_stores_that_are_gone_or_have_changed_are_said_to_be_unknown(run: Path, tmp_path: Path) -> None:
    document = read_run(str(run))
    config = {**document.config, "images": "/home/me/secret/gone.zarr"}
    write_run(str(tmp_path), replace(document, config=config, texts_data="0" * 64))
    images, texts = origin_of(str(tmp_path), 1, "model").sources
    assert (images.store, images.rows, images.names) == ("gone.zarr", None, ())
    assert images.digest == document.images_data
    assert "could not be read" in str(images.unknown)
    assert (texts.rows, texts.names) == (None, ())
    assert "other content" in str(texts.unknown)


def test_weights_that_were_changed_since_have_no_origin(run: Path, tmp_path: Path) -> None:
    export(str(run), str(tmp_path / "student"))
    export(str(run), str(tmp_path / "other"), checkpoint="2")
    document = read_export(str(tmp_path / "other"))
    changed = replace(document, model=replace(document.model, weights="0" * 64))
    (tmp_path / "other" / EXPORT_FILE).write_text(json.dumps(changed.to_json()))
    export(str(tmp_path / "other"), str(tmp_path / "again"))
    assert read_export(str(tmp_path / "again")).origin is None


@pytest.mark.parametrize(
    ("private", "shown"),
    [
        ("/home/me/data/laion/{00000..00099}.tar", "{00000..00099}.tar"),
        ("~/pictures/", "pictures"),
        ("..", "unnamed"),
        ("/", "unnamed"),
        ("../../me/x.txt", "x.txt"),
        (r"C:\Users\me\photos", "photos"),
        ("s3://my-bucket/me/x.zarr", "x.zarr"),
        ("s3://my-bucket", "unnamed"),
        ("https://me:password@host.example/x.tar?token=secret#part", "x.tar"),
        ("file:///home/me/x.tar", "x.tar"),
        ("local-dir:/home/me/teacher", "local-dir:teacher"),
        ("hf-hub:/home/me/teacher", "teacher"),
        ("hf-hub:org/model", "hf-hub:org/model"),
        ("ViT-B/32", "ViT-B/32"),
        ("laion2b_s32b_b82k", "laion2b_s32b_b82k"),
    ],
)
def test_of_a_path_its_last_part_alone_is_public(private: str, shown: str) -> None:
    assert public({"a": [private, 1, None]}) == {"a": [shown, 1, None]}
