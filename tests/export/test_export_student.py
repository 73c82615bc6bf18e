"""Students and exports: an exported folder is an ordinary open_clip model with the outputs of the trained student."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cache_schemas.run import WEIGHTS_FILE
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, StoreError, TeacherError, TrainingError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.evaluation.predictions import read_predictions
from dimefm.evaluation.results import read_results
from dimefm.export.check import LEAST_COSINE
from dimefm.export.export_student import export
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.models.clip import Clip, load_clip
from dimefm.models.exported import read_export
from dimefm.models.towers import build_student, student_spec
from dimefm.store.embedding_store import Store
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.run_folder import read_run
from dimefm.training.train import train
from tests.disks import Disk
from tests.making import make_jpeg
from tests.stores import teacher_identity
from tests.tiny_clip import write_clip
from tests.tiny_training import tiny_config


@pytest.fixture(scope="module", params=["test_resnet", "ViT-small"])
def run(
    request: pytest.FixtureRequest, image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A two-step run of a timm tower, and of a ViT of open_clip by a config of one's own."""
    out, student = tmp_path_factory.mktemp("runs") / request.param, request.param
    if student == "ViT-small":
        student = str(tmp_path_factory.mktemp("configs") / "ViT-small.json")
        vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
        Path(student).write_text(json.dumps({"vision_cfg": vision}))
    train(tiny_config(image_store, text_store, out, student=student, max_steps=2, epochs=1))
    return out


def trained_tower(run: Path) -> torch.nn.Module:
    state = Checkpoints(str(run)).load()
    assert state is not None
    tower = build_student(read_run(str(run)).student)
    tower.load_state_dict(state["image"]["model"])
    return tower.eval()  # type: ignore[no-any-return]


def test_open_clip_loads_an_export_with_identical_outputs(run: Path, clip: Clip, tmp_path: Path) -> None:
    export(str(run), str(tmp_path / "student"))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'student'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'student'}")
    model.eval()
    spec = read_run(str(run)).student
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = normalise(pixels, spec.mean, spec.std)
    with torch.inference_mode():
        assert torch.equal(model.encode_image(images), trained_tower(run)(images))
        texts = ["a photo of a dog.", "two boats"]
        mine = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
        torch.testing.assert_close(mine, clip.encode_texts(texts), rtol=0, atol=1e-5)
        assert preprocess.transforms[0].size == 32
    assert float(model.logit_scale.detach().exp()) == pytest.approx(clip.identity.logit_scale)


def test_an_export_preprocesses_as_validation_did(run: Path, tmp_path: Path) -> None:
    export(str(run), str(tmp_path / "student"))
    exported = load_clip(f"local-dir:{tmp_path / 'student'}", device="cpu")
    spec = read_run(str(run)).student
    assert exported.identity.preprocessing.size == (32, 32)
    assert exported.identity.preprocessing.mean == spec.mean
    image = Preprocess(exported.identity.preprocessing)(make_jpeg((80, 50)))
    with torch.inference_mode():
        direct = F.normalize(trained_tower(run)(normalise(image[None], spec.mean, spec.std)), dim=-1)
    torch.testing.assert_close(exported.encode_images(image[None]), direct)


def test_a_run_and_its_export_are_evaluated_alike(run: Path, cifar10: str, tmp_path: Path) -> None:
    export(str(run), str(tmp_path / "student"))
    found = {}
    for name, model in (("run", run), ("export", tmp_path / "student")):
        config = EvaluationConfig(
            model=str(model), folders=(cifar10,), out=str(tmp_path / "out"), name=name, predictions=True
        )
        (result,) = evaluate(config).results
        assert read_results(str(tmp_path / "out" / name)) == [result]
        found[name] = (result.metrics, result.intervals, result.images, result.model["weights"], result.digests)
        found[name] += (read_predictions(str(tmp_path / "out" / name), result),)
    assert found["run"] == found["export"]
    assert len(found["run"][-1]) == found["run"][2] == 200


def test_exporting_again_is_harmless_and_never_overwrites(run: Path, tmp_path: Path) -> None:
    export(str(run), str(tmp_path / "student"))
    export(str(run), str(tmp_path / "student"))
    (tmp_path / "student" / "open_clip_config.json").write_text("{}")
    with pytest.raises(OutputExistsError):
        export(str(run), str(tmp_path / "student"))
    assert (tmp_path / "student" / "open_clip_config.json").read_text() == "{}"


def test_export_refuses_another_teacher_and_an_empty_run(run: Path, tmp_path: Path, sample: Path) -> None:
    export(str(run), str(tmp_path / "student"))
    with pytest.raises(MismatchError, match="is not the teacher of"):
        export(str(run), str(tmp_path / "other"), teacher=f"local-dir:{tmp_path / 'student'}")
    with pytest.raises(TeacherError, match="--pretrained has no effect with local-dir:"):
        export(str(run), str(tmp_path / "other"), pretrained="openai")
    with pytest.raises(StoreError, match="no checkpoint best"):
        export(str(run), str(tmp_path / "other"), checkpoint="best")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_cut_short_names_the_others(run: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "model": {"w": torch.ones(1000)}})
    file = tmp_path / "checkpoints" / "step-00000002.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(StoreError, match=r"step-00000002.pt cannot be read: its checksum(?s:.*)on from step-00000001"):
        checkpoints.load()
    file.unlink()
    state = checkpoints.load()
    assert state is not None
    assert state["step"] == 1


def test_checkpoints_keep_the_last_two_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, None)):
        checkpoints.save(step, {"step": step}, score)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("*.pt"))
    assert kept == ["step-00000002.pt", "step-00000004.pt", "step-00000005.pt"]
    assert (checkpoints.step("last"), checkpoints.step("best")) == (5, 2)


@pytest.mark.parametrize(
    ("name", "size"), [("ViT-B-32", 224), ("RN50", 224), ("resnet10t", 64), ("vit_tiny_patch16_224", 224)]
)
def test_students_of_both_libraries_have_the_teachers_width(name: str, size: int) -> None:
    spec = student_spec(name, teacher_identity(), image_size=size)
    tower = build_student(spec).eval()
    with torch.inference_mode():
        assert tower(torch.zeros(2, 3, size, size)).shape == (2, 16)


def test_a_tower_that_open_clip_cannot_project_is_refused() -> None:
    """Its last layers are wider than timm's features, which open_clip's projection is made for."""
    with pytest.raises(TrainingError, match="cannot build lcnet_050 at 64 px: mat1 and mat2"):
        build_student(student_spec("lcnet_050", teacher_identity(), image_size=64))


def test_a_student_shares_the_teachers_activation() -> None:
    quick = build_student(student_spec("ViT-B-32", teacher_identity(activation="quick_gelu")))
    assert any(type(m).__name__ == "QuickGELU" for m in quick.modules())
    plain = build_student(student_spec("ViT-B-32", teacher_identity()))
    assert not any(type(m).__name__ == "QuickGELU" for m in plain.modules())


def test_students_that_do_not_exist_are_refused() -> None:
    with pytest.raises(TrainingError, match="no image tower is called 'resnet9000'"):
        student_spec("resnet9000", teacher_identity())
    with pytest.raises(TrainingError, match="takes only images of 224 px"):
        student_spec("vit_tiny_patch16_224", teacher_identity(), image_size=96)
    with pytest.raises(TrainingError, match="cannot build"):
        build_student(replace(student_spec("ViT-B-32", teacher_identity()), vision_cfg={"layers": 1, "width": -1}))


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-L-14", "openai", "were trained with QuickGELU, which ViT-L-14 does not use"),
        ("ViT-L-14-quickgelu", "laion2b_s32b_b82k", "cannot load|trained with GELU"),
        ("ViT-L-14", None, "no weights named for ViT-L-14"),
        ("ViT-nonsense", "x", "ViT-nonsense is neither a folder nor an architecture"),
        ("local-dir:/nowhere/at/all", None, "cannot load"),
    ],
)
def test_a_teacher_that_would_be_another_model_is_refused(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_clip(name, pretrained, device="cpu")


def test_a_teacher_folder_without_weights_is_refused(sample: Path, tmp_path: Path) -> None:
    """open_clip itself would warn and go on with random weights."""
    config = (sample / "teacher" / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(TeacherError, match="cannot load"):
        load_clip(f"local-dir:{tmp_path}", device="cpu")


def test_the_weight_digest_sees_one_changed_value(clip: Clip, teacher_name: str) -> None:
    other = load_clip(teacher_name, device="cpu")
    from dimefm.models.clip import digest_weights

    assert digest_weights(other.model) == clip.identity.weights
    with torch.no_grad():
        next(iter(other.model.parameters())).view(-1)[0] += 1e-3
    assert digest_weights(other.model) != clip.identity.weights


def test_embeddings_are_unit_vectors(clip: Clip) -> None:
    norms = clip.encode_texts(["one", "a much longer sentence about nothing at all"]).norm(dim=1)
    np.testing.assert_allclose(norms.numpy(), 1, atol=1e-6)


def test_weights_of_half_the_size_are_nearly_the_same_model(cifar10: str, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "tiny", scale=3)
    export(source, str(tmp_path / "half"), precision="fp16", check_on=(cifar10,))
    sizes = [(Path(one) / "open_clip_model.safetensors").stat().st_size for one in (source, tmp_path / "half")]
    assert sizes[1] < 0.52 * sizes[0]
    assert len({file.stat().st_mode for file in (tmp_path / "half").iterdir()}) == 1
    document, loaded = read_export(str(tmp_path / "half")), load_clip(f"local-dir:{tmp_path / 'half'}", device="cpu")
    assert document.checks is not None
    assert 0.9999 < document.checks["image_cosine"] < 1
    assert (document.model.weights, document.text_tower) == (loaded.identity.weights, loaded.text_digest())


def test_a_model_that_does_not_agree_leaves_nothing(
    cifar10: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_clip(tmp_path / "tiny", scale=3)
    monkeypatch.setitem(LEAST_COSINE, "fp16", 1.0)
    with pytest.raises(DimefmError, match=r"(?s)smallest cosine of images of 0.9999.*give --precision fp32"):
        export(source, str(tmp_path / "half"), precision="fp16", check_on=(cifar10,))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "tiny")
    weights = load_file(Path(source, WEIGHTS_FILE))
    weights["visual.proj"][0, 0] = torch.nan
    save_file(weights, Path(source, WEIGHTS_FILE), metadata={"format": "pt"})
    with pytest.raises(
        DimefmError, match=r"weights that are NaN or infinite, first in visual.proj \(1 tensor(?s:.*)another model"
    ):
        export(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_tokenizers_an_open_clip_folder_is_written_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_clip(tmp_path / "tiny")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    export(source, str(tmp_path / "out"))
    assert "tokenizer.json is left out" in (noted := capsys.readouterr().err)
    assert 'pip install "dimefm[export]"' in noted
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(DimefmError, match=r'(?s)--format onnx needs tokenizers.*pip install "dimefm\[export\]"'):
        export(source, str(tmp_path / "onnx"), format="onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_full_disk_leaves_nothing(disk: Disk, cifar10: str, tmp_path: Path, precision: str) -> None:
    source = write_clip(tmp_path / "tiny")
    disk.options("size=1m")
    with pytest.raises(StoreError, match="cannot be written: No space left on device"):
        export(source, str(disk.path / "out"), precision=precision, check_on=(cifar10,))
    assert not any(disk.path.iterdir())
