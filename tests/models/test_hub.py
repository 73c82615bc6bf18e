"""A model that a document names is loaded from this machine alone, and its folder runs nothing."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cache_schemas.run import CONFIG_FILE, RUN_FILE, WEIGHTS_FILE
from dimefm.errors import TeacherError
from dimefm.export.export_student import export
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import load_clip
from dimefm.models.hub import require_cached
from dimefm.models.towers import TextSpec, tokenizer_of
from dimefm.retrieval.search import search
from tests.stores import random_store
from tests.system.test_named_paths import changed
from tests.tiny_clip import write_clip

HUB = "hf-hub:somebody/model"


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been fetched; with a cache of the hub that holds nothing."""
    found: list[str] = []

    def download(model_id: str, *args: object, **options: object) -> str:
        found.append(model_id)
        raise FileNotFoundError("there is no network in tests")

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return found


def in_cache(folder: Path, repository: str, **files: bytes) -> None:
    """As huggingface_hub keeps what it has fetched."""
    place = folder / "hub" / f"models--{repository.replace('/', '--')}"
    for name, data in files.items():
        path = place / "snapshots" / "c0" / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text("c0")


def with_config(folder: Path, part: str, **fields: Any) -> str:
    """An open_clip folder whose config says this too, as --teacher takes it."""
    write_clip(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"][part].update(fields)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_search_and_verify_do_not_fetch_the_teacher_that_a_store_names(tmp_path: Path, asked: list[str]) -> None:
    store, _ = random_store(tmp_path / "t.zarr", rows=20, shard_rows=16, kind="text", name=HUB)
    message = rf"t\.zarr names the teacher {HUB}, and {HUB} is not on this machine(?s:.*)--teacher {HUB}"
    with pytest.raises(TeacherError, match=message):
        search(store.path, texts=["a cat"], device="cpu")
    with pytest.raises(TeacherError, match=message):
        verify(VerifyConfig(store=store.path, sample=2))
    assert asked == []
    with pytest.raises(TeacherError, match=f"cannot load {HUB}"):
        search(store.path, texts=["a cat"], teacher=HUB, device="cpu")
    assert asked == ["somebody/model"]


def test_export_does_not_fetch_the_teacher_that_a_run_names(tmp_path: Path, trained: Path, asked: list[str]) -> None:
    path = trained / RUN_FILE
    document = json.loads(path.read_text())
    path.write_text(json.dumps(changed(document, teacher={**document["teacher"], "name": HUB})))
    with pytest.raises(TeacherError, match=f"names the teacher {HUB}"):
        export(str(trained), str(tmp_path / "out"))
    assert asked == []


@pytest.fixture
def trained(tiny_run: list[str], tmp_path: Path) -> Path:
    from click.testing import CliRunner

    from dimefm.cli import cli

    result = CliRunner().invoke(cli, [*tiny_run, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def test_what_the_hub_has_given_before_is_loaded(tmp_path: Path, asked: list[str]) -> None:
    config = json.dumps({"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}).encode()
    in_cache(tmp_path, "somebody/model", open_clip_config__json=config)
    with pytest.raises(TeacherError, match="is not on this machine"):
        require_cached(HUB, "s.zarr")  # its weights are not
    in_cache(tmp_path, "somebody/model", open_clip_model__safetensors=b"")
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path / "hub" / "models--somebody--model" / "snapshots" / "c0" / CONFIG_FILE
        patch.setattr("open_clip.factory.download_pretrained_from_hf", lambda *args, **options: str(place))
        require_cached(HUB, "s.zarr")
    for name in ("ViT-B-32", "local-dir:/nowhere"):
        require_cached(name, "s.zarr")
    assert asked == []


@pytest.mark.parametrize(
    ("part", "field", "model"),
    [("text_cfg", "hf_model_name", "somebody/text"), ("vision_cfg", "timm_model_name", "hf-hub:somebody/tower")],
)
def test_a_folder_does_not_lead_to_the_hub_either(tmp_path: Path, part: str, field: str, model: str) -> None:
    name = with_config(tmp_path / "model", part, **{field: model})
    with pytest.raises(TeacherError, match=f"names the teacher {name}, and {model} is not on this machine"):
        require_cached(name, "s.zarr")
    in_cache(tmp_path, model.removeprefix("hf-hub:"), config__json=b"{}")
    require_cached(name, "s.zarr")


def test_no_config_makes_a_tokenizer_trust_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    automatic = SimpleNamespace(from_pretrained=lambda name, **options: made.append(options))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=automatic))
    name = with_config(
        tmp_path / "model", "text_cfg", hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True}
    )
    with pytest.raises(TeacherError, match="hands its tokenizer trust_remote_code, which could fetch or run something"):
        load_clip(name, device="cpu")
    with pytest.raises(TeacherError, match="hands its tokenizer trust_remote_code"):
        tokenizer_of(TextSpec(name=name, text_cfg={}, embed_dim=16, activation="gelu"))
    assert made == []


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "model.pth"])
def test_a_pickle_in_a_teachers_folder_is_not_run(tmp_path: Path, file: str) -> None:
    folder = Path(write_clip(tmp_path / "model"))
    (folder / WEIGHTS_FILE).unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(TeacherError, match="cannot load"):
        load_clip(f"local-dir:{folder}", device="cpu")
    with pytest.raises(TeacherError, match="cannot load"):
        load_clip("ViT-B-32-quickgelu", str(folder / file), device="cpu")
    assert not (tmp_path / "ran").exists()
