"""Where an export says it comes from: its run and stores, and nothing of the machine that it was made on."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from cache_schemas.export import CARD_FILE, EXPORT_FILE
from dimefm.export.export_student import export
from dimefm.export.origin import origin_of, public
from dimefm.models.exported import read_export
from dimefm.models.hub import repository_of
from dimefm.training.run_folder import read_run, write_run


def test_an_export_says_what_its_student_was_distilled_from_and_on(finished_run: Path, exported: Path) -> None:
    origin, document = read_export(str(exported)).origin, read_run(str(finished_run))
    assert origin is not None
    assert (origin.student, origin.step, origin.steps, origin.images_seen) == ("test_resnet", 2, 2, 32)
    assert (origin.teacher, origin.teacher_weights) == ("local-dir:tiny", document.teacher.weights)
    assert origin.repository is None
    images, texts = origin.sources
    assert (images.names, images.rows, images.digest) == (("images-00000.tar",), 96, document.images_data)
    assert (texts.store, texts.names, texts.rows) == ("texts.zarr", ("sentences.txt",), 200)


def test_the_document_has_the_digest_of_every_file_beside_it(exported: Path) -> None:
    files = {file.name: sha256(file.read_bytes()).hexdigest() for file in exported.iterdir()}
    files = {name: digest for name, digest in files.items() if name not in (EXPORT_FILE, CARD_FILE)}
    assert read_export(str(exported)).files == files


def test_an_export_holds_no_path_of_this_machine(exported: Path, finished_run: Path, teacher_name: str) -> None:
    private = [exported.parent, finished_run.parent, Path(teacher_name.removeprefix("local-dir:")).parent]
    for file in exported.iterdir():
        content = file.read_bytes()
        assert not [path for path in private if str(path).encode() in content], file.name


def test_stores_that_are_gone_or_have_changed_are_said_to_be_unknown(finished_run: Path, tmp_path: Path) -> None:
    document = read_run(str(finished_run))
    config = {**document.config, "images": "/home/me/secret/gone.zarr"}
    write_run(str(tmp_path), replace(document, config=config, texts_data="0" * 64))
    images, texts = origin_of(str(tmp_path), 1, "model", document.teacher).sources
    assert (images.store, images.rows, images.names) == ("gone.zarr", None, ())
    assert images.digest == document.images_data
    assert "could not be read" in str(images.unknown)
    assert (texts.rows, texts.names) == (None, ())
    assert "other content" in str(texts.unknown)


def test_an_export_keeps_the_origin_of_the_same_weights_alone(student: Path, tmp_path: Path) -> None:
    document = read_export(str(student))
    export(str(student), str(tmp_path / "again"))
    assert read_export(str(tmp_path / "again")).origin == document.origin
    changed = replace(document, model=replace(document.model, weights="0" * 64))
    (student / EXPORT_FILE).write_text(json.dumps(changed.to_json()))
    export(str(student), str(tmp_path / "other"))
    assert read_export(str(tmp_path / "other")).origin is None


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
        ("/home/me/a.zarr::s3://my-bucket/me/b.zarr", "a.zarr::b.zarr"),
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


@pytest.mark.parametrize(
    ("name", "tag", "repository"),
    [
        ("ViT-B/32", "openai", "timm/vit_base_patch32_clip_224.openai"),
        ("ViT-B-32", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("hf-hub:org/model@main", None, "org/model"),
        ("hf-hub:/home/me/model", None, None),
        ("ViT-B-32", "/home/me/weights.pt", None),
        ("local-dir:/home/me/model", None, None),
    ],
)
def test_the_repository_of_a_teacher_on_the_hub(name: str, tag: str | None, repository: str | None) -> None:
    assert repository_of(name, tag) == repository
