"""A vision-only teacher, from its store to what its student can be measured by."""

from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from cache_schemas import SchemaError
from dimefm.cli import cli
from dimefm.errors import TeacherError, TrainingError
from dimefm.models.clip import load_clip
from dimefm.models.hub import require_cached
from dimefm.store.embedding_store import Store
from dimefm.training.before_training import notes_on_inputs
from dimefm.training.config import LossConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import sample
from dimefm.training.run_folder import open_inputs
from dimefm.training.train import train
from tests.making import read_tar, write_tar
from tests.stores import random_store
from tests.tiny_training import tiny_config

TEACHER = "timm:test_vit"


def dimefm(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with random weights of the teacher, and a classifier, which is left out."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = timm.create_model("test_vit", num_classes=10).state_dict()
    path = tmp_path_factory.mktemp("vision") / "teacher.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def store(weights: Path, image_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("vision") / "images.zarr")
    done = dimefm("cache-images", image_tar, "--out", out, "--teacher", TEACHER, "--pretrained", weights,
                  "--shard-rows", 64, "--device", "cpu", "--workers", 1)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "without a text tower" in done.output
    return out


@pytest.fixture(scope="module")
def run(store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student of that teacher alone, without sentences."""
    out = str(tmp_path_factory.mktemp("vision") / "run")
    done = dimefm("train-student", "--images", store, "--out", out, "--recipe", "sample", "--image-size", 32,
                  "--batch-size", 16, "--max-steps", 20, "--epochs", 20, "--loss", "pvl=0.1,udist=0.1,centred=1",
                  "--log-every", 1, "--workers", 0, "--precision", "fp32")  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


def test_a_student_learns_from_it_without_sentences(run: str) -> None:
    values = [line["centred"] for line in read_metrics(run) if line["event"] == "train"]
    assert sum(values[-5:]) < 0.95 * sum(values[:5])


def test_its_identity_says_that_it_has_no_text_tower(store: str) -> None:
    teacher = Store(store).schema.teacher
    assert not teacher.has_text
    assert (teacher.tokenizer, teacher.context_length, teacher.embed_dim) == ("", 0, 64)
    assert teacher.preprocessing.size == (160, 160)


def test_what_needs_a_text_tower_is_refused_with_the_reason(
    run: str, store: str, weights: Path, cifar10: str, image_tar: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\n")
    for words, said in (
        (["cache-texts", texts, "--teacher", TEACHER, "--pretrained", weights, "--out", tmp_path / "t.zarr"],
         "has no text tower: it gives embeddings of images alone"),
        (["cache-images", image_tar, "--captions", "txt", "--teacher", TEACHER, "--pretrained", weights,
          "--out", tmp_path / "i.zarr"], "remedy: leave --captions out"),
        (["evaluate", run, cifar10, "--out", tmp_path / "out"], "--task linear-probe or --task few-shot"),
        (["export", run, "--out", tmp_path / "student"], "timm:test_vit, has no text tower, and a model of open_clip"),
        (["evaluate", run, cifar10, "--teacher", "1"], "has one teacher: --teacher 1 has no effect"),
        (["predict", run, image_tar, "--classes", "cat,dog"], "has no text tower"),
        (["train-student", "--images", store, "--out", tmp_path / "r", "--loss", "vl=1"], "Missing --texts"),
    ):  # fmt: skip
        done = dimefm(*words)
        assert done.exit_code != 0
        assert said in done.output, done.output


def test_losses_on_scores_have_no_scale_of_such_a_teacher(store: str, tmp_path: Path) -> None:
    config = sample(store, None, str(tmp_path / "run"), loss=LossConfig(vl=0, pvl=1, logit_scale="teacher"))
    with pytest.raises(TrainingError, match="no text tower, and so no logit scale"):
        open_inputs(config)


def test_a_text_store_of_such_a_teacher_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="is empty, as of a vision-only teacher"):
        random_store(tmp_path / "texts", rows=4, shard_rows=4, kind="text", tokenizer="")


def test_weights_that_do_not_fit_are_refused(weights: Path, tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    del state["norm.weight"]
    save_file(state, tmp_path / "lacking.safetensors")
    with pytest.raises(TeacherError, match=r"does not fit: 1 tensors are missing .* such as norm\.weight"):
        load_clip(TEACHER, str(tmp_path / "lacking.safetensors"), device="cpu")
    for name, pretrained, said in (
        ("timm:test_vitt", None, "no model of timm is called 'test_vitt'"),
        (TEACHER, str(tmp_path / "none.pt"), "there is no file"),
        (f"timm:local-dir:{tmp_path}", None, "there is no config.json of timm"),
    ):
        with pytest.raises(TeacherError, match=said):
            load_clip(name, pretrained, device="cpu")


def test_a_repository_that_a_document_names_is_not_fetched() -> None:
    with pytest.raises(TeacherError, match="is not on this machine: it would be fetched"):
        require_cached("timm:hf-hub:someone/model", "a store")


def test_a_folder_of_timm_is_a_teacher(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    timm.models.save_for_hf(model, tmp_path / "folder")
    clip = load_clip(f"timm:local-dir:{tmp_path / 'folder'}", device="cpu")
    pixels_B3HW = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    model.reset_classifier(0)
    facts = clip.identity.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    expected_BD = torch.nn.functional.normalize(model.eval()((pixels_B3HW / 255 - mean) / std), dim=-1)
    torch.testing.assert_close(clip.encode_images(pixels_B3HW), expected_BD.detach(), rtol=0, atol=1e-5)


def test_beside_a_clip_teacher_it_has_the_losses_without_sentences(
    store: str, image_store: Store, text_store: Store, cifar10: str, tmp_path: Path
) -> None:
    config = tiny_config(
        image_store, text_store, tmp_path / "run", more_images=(store,), max_steps=2, log_every=1,
        loss=LossConfig(vl=1, pvl=0, cosine=1),
    )  # fmt: skip
    assert notes_on_inputs(config) == [f"the teacher of {store} has no sentences: vl will not be learned from it"]
    train(config)
    names = {name for line in read_metrics(config.out) for name in line if name.startswith("teacher")}
    assert names == {"teacher1_loss", "teacher1_vl", "teacher1_cosine", "teacher2_loss", "teacher2_cosine"}
    for words, said in (
        (["--teacher", "all"], "has 1 teacher with a text tower: --teacher all has no effect"),
        (["--teacher", "2"], f"teacher 2 of {config.out} has no text tower to measure zero-shot with"),
        (["--teacher", "3"], "has no teacher 3"),
    ):
        done = dimefm("evaluate", config.out, cifar10, *words, "--out", tmp_path / "out")
        assert said in done.output, done.output


@pytest.mark.slow
def test_a_linear_probe_measures_its_student(run: str, sample: Path, tmp_path: Path) -> None:
    members = read_tar(sample / "eval" / "cifar10" / "test-00000.tar", 2 * 200)
    folder = tmp_path / "set"
    for split in ("train", "test"):
        write_tar(folder / split / f"{split}-00000.tar", members)
    (folder / "classnames.txt").write_bytes((sample / "eval" / "cifar10" / "classnames.txt").read_bytes())
    done = dimefm("evaluate", run, folder, "--task", "linear-probe", "--out", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "linear-probe" in done.output
