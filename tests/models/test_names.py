"""Mistyped names of models and weights: what is meant is named, and torch is not imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
from timm.models._registry import _model_entrypoints

from cache_schemas.run import CONFIG_FILE
from dimefm.errors import TeacherError, TrainingError
from dimefm.models.names import require_model, require_student, timm_names

_READ = """
import json, sys
from dimefm.models.names import architectures, tags, timm_names
found = {name: tags(name) for name in architectures()}
timm_names()
assert not {"open_clip", "timm", "torch"} & set(sys.modules)
print(json.dumps(found))
"""


def test_names_read_from_sources_are_those_of_the_libraries() -> None:
    found = subprocess.run([sys.executable, "-c", _READ], capture_output=True, text=True, check=True).stdout

    read = json.loads(found)
    known = {name: open_clip.list_pretrained_tags_by_model(name) for name in open_clip.list_models()}
    assert read == {name: known[name] for name in known if name in read}
    # other tests of this process may have told open_clip of architectures of their own
    own = {path.stem for path in Path(open_clip.__file__).parent.joinpath("model_configs").glob("*.json")}
    assert own <= read.keys()
    assert set(timm.list_models()) <= timm_names()
    assert timm_names() == set(_model_entrypoints)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model, a run and a file of weights."""
    for name, file in (("student", CONFIG_FILE), ("run", "run.json"), ("other", "x.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "weights.pt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("ViT-B32", "openai", "did you mean 'ViT-B-32'"),
        ("vit_b_32", None, "did you mean 'ViT-B-32'"),
        ("elephant", "openai", "docs/architectures.md lists all names"),
        ("ViT-B-32", None, "give --pretrained with a tag such as openai, or a file (open_clip.list_pretrained_tags"),
        ("ViT-B/32", "openia", "did you mean 'openai'?"),
        ("ViT-B-32", "nothing-like-it", "give a tag such as openai, or a file"),
        ("ViT-B-32", "wieghts.pt", "did you mean 'weights.pt'?"),
        ("ViT-B-32-plus-256", "x", "give a file: open_clip has no weights of ViT-B-32-plus-256"),
        ("EVA01-g-14", "x", "give a file, or one of its tags: laion400m_s11b_b41k"),
        ("student", None, "name it local-dir:student"),
        ("./studnet", None, "did you mean 'local-dir:student'?"),
        ("local-dir:studnet", None, "did you mean 'local-dir:student'?"),
        ("local-dir:nowhere/at/all", None, "check the path"),
        ("local-dir:other", None, "give a folder that open_clip or dimefm export wrote"),
        ("local-dir:run", None, "dimefm export run --out STUDENT"),
        ("run", None, "dimefm export run --out STUDENT"),
        ("hf_hub:org/model", None, "name it hf-hub:org/model"),
        ("laion/CLIP-huge", None, "if it is a repository of the Hub, name it hf-hub:laion/CLIP-huge"),
    ],
)
def test_what_is_meant(folder: Path, name: str, pretrained: str | None, expected: str) -> None:
    with pytest.raises(TeacherError) as caught:
        require_model(name, pretrained)
    assert expected in str(caught.value.remedy)
    assert str(caught.value).count("\n") == 1


def test_a_folder_without_a_prefix_where_a_command_takes_folders(folder: Path) -> None:
    with pytest.raises(TeacherError, match="did you mean 'student'"):
        require_model("studnet", None, folder="")


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("ViT-B-32", "openai"),
        ("ViT-B/32", "OpenAI"),
        ("ViT-B-32", "laion2b-s34b-b79k"),
        ("ViT-B-32", "weights.pt"),
        ("local-dir:student", None),
        ("hf-hub:org/model", None),
    ],
)
def test_what_is_taken(folder: Path, name: str, pretrained: str | None) -> None:
    require_model(name, pretrained)


def test_students() -> None:
    require_student("ViT-B-32", "ViT-B-16")
    require_student("resnet18", None)
    require_student("resnet18.a1_in1k", None)
    with pytest.raises(TrainingError, match="did you mean 'resnet18'"):
        require_student("resnet-18", None)
    with pytest.raises(TrainingError, match="lists all names of open_clip"):
        require_student("elephant", None)
    with pytest.raises(TrainingError, match="did you mean 'ViT-B-32'"):
        require_student(None, "ViT-B32")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot read the student tower.json: No such file"),
        ("{", "tower.json is not JSON"),
        ("[]", "tower.json has no vision_cfg"),
        ('{"model_cfg": 1}', "tower.json has no vision_cfg"),
    ],
)
def test_a_config_file_that_is_none_is_named(folder: Path, text: str | None, expected: str) -> None:
    if text is not None:
        Path("tower.json").write_text(text)

    with pytest.raises(TrainingError, match=expected):
        require_student("tower.json", None)
