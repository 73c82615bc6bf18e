"""Several teachers: one tower with a projection for each, their losses summed, rows that are the same images."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import multiprocessing
from torch.nn import functional as F

from cache_schemas import Failure, Status, ViewPlan
from dimefm.cli import cli
from dimefm.datasets.own_sets import open_folders
from dimefm.errors import MismatchError, TeacherError, TrainingError
from dimefm.evaluation.open_model import open_model
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.inspection.describe_model import describe_run
from dimefm.models.clip import Clip, load_clip
from dimefm.models.exported import read_export
from dimefm.models.towers import build_student, of_columns, student_spec, widened
from dimefm.store.embedding_store import Store
from dimefm.training.batch_loader import Request
from dimefm.training.build_towers import build_towers
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.distributed import Place
from dimefm.training.dry_run import foresee
from dimefm.training.feed import notes_on_feed, open_feed
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.objective import Objective
from dimefm.training.read_metrics import read_metrics
from dimefm.training.run_folder import open_inputs, plan_run, read_run
from dimefm.training.several_teachers import SeveralObjectives
from dimefm.training.student import distilled_from, write_student
from dimefm.training.teacher_stores import require_same_images, require_same_rows, require_same_sentences, rows_of_all
from dimefm.training.train import train
from dimefm.training.validation import class_embeddings, count_correct
from tests.conftest import cached
from tests.processes import FORKING
from tests.stores import random_store, teacher_identity
from tests.tiny_clip import write_clip
from tests.tiny_training import STUDENT, same, tiny_config, weights
from tests.training.test_distributed import free_port

WIDTH, OTHER = 128, 48
Config = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A second teacher, of another width and with other towers."""
    folder = write_clip(tmp_path_factory.mktemp("other") / "tiny", image_seed=5, text_seed=6, scale=3, width=OTHER)
    return load_clip(f"local-dir:{folder}", device="cpu")


@pytest.fixture(scope="module")
def other_images(image_tar: Path, other: Clip, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Its store of the same images, in other shards."""
    return cached("image", image_tar, tmp_path_factory.mktemp("stores") / "other.zarr", other, shard_rows=48)


@pytest.fixture(scope="module")
def config(
    image_store: Store, text_store: Store, other_images: Store, text_file: Path, other: Clip,
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:  # fmt: skip
    """Makes the config of a run with both teachers."""
    texts = cached("text", text_file, tmp_path_factory.mktemp("stores") / "other_texts.zarr", other)

    def make(out: Path, **changes: Any) -> TrainConfig:
        more: dict[str, Any] = {"more_images": (other_images.path,), "more_texts": (texts.path,)}
        return tiny_config(image_store, text_store, out, **(more | changes))

    return make


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of 30 steps with two teachers, the second of which counts half."""
    found = config(
        tmp_path_factory.mktemp("runs") / "two", log_every=1, epochs=20, max_steps=30, checkpoint_every=100,
        loss=LossConfig(vl=0.2, pvl=0, centred=1), crop_scale=(0.9, 1.0), teacher_weights=(1, 0.5),
        teacher_scales=(30, 15),
    )  # fmt: skip
    train(found)
    return found.out


def test_the_losses_of_both_teachers_fall_and_are_logged_by_their_number(run: str) -> None:
    lines = [line for line in read_metrics(run) if line["event"] == "train"]
    for name in ("teacher1_centred", "teacher2_centred", "teacher1_vl", "teacher2_vl"):
        values = [line[name] for line in lines]
        assert np.mean(values[-5:]) < 0.95 * np.mean(values[:5]), name
    for line in lines:
        assert line["loss"] == pytest.approx(line["teacher1_loss"] + 0.5 * line["teacher2_loss"], rel=1e-5)
        assert line["teacher2_loss"] == pytest.approx(0.2 * line["teacher2_vl"] + line["teacher2_centred"], rel=1e-5)


def test_run_json_has_both_teachers(run: str, clip: Clip, other: Clip, other_images: Store) -> None:
    document = read_run(run)
    assert [one.weights for one in document.teachers] == [clip.identity.weights, other.identity.weights]
    assert document.student.embed_dim == WIDTH + OTHER
    assert document.more_teachers[0].images_data == other_images.contents.digest
    assert ("teacher weights", "1, 0.5") in describe_run(run).rows


def test_the_student_leaves_with_the_text_tower_of_either_teacher(
    run: str, clip: Clip, other: Clip, tmp_path: Path
) -> None:
    whole = build_student(read_run(run).student)
    whole.load_state_dict(weights(run))
    pixels_B3HW = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parts = []
    for teacher, named, columns in (
        (clip, None, slice(0, WIDTH)),
        (other, "2", slice(WIDTH, None)),
        (other, other.identity.name, slice(WIDTH, None)),
    ):
        out = tmp_path / f"student{len(parts)}"
        assert write_student(run, str(out), teacher=named).weights == teacher.identity.weights
        student = load_clip(f"local-dir:{out}", device="cpu")
        assert torch.equal(student.encode_texts(["a dog"]), teacher.encode_texts(["a dog"]))
        facts = student.identity.preprocessing
        features_BD = whole.eval()(normalise(pixels_B3HW, facts.mean, facts.std))
        parts.append(student.encode_images(pixels_B3HW))
        expected_BD = F.normalize(features_BD[:, columns], dim=-1).detach()
        torch.testing.assert_close(parts[-1], expected_BD, rtol=0, atol=1e-5)
    assert torch.equal(parts[1], parts[2])
    with open_model(run, teacher="all", device="cpu") as both:
        texts = both.encode_texts(["a dog", "two cats on a bed"])
        cosine = both.encode_images(pixels_B3HW) @ texts.T
    mean = sum(
        weight * part @ teacher.encode_texts(["a dog", "two cats on a bed"]).T
        for weight, part, teacher in ((2 / 3, parts[0], clip), (1 / 3, parts[1], other))
    )
    torch.testing.assert_close(cosine, mean, rtol=0, atol=1e-5)
    with pytest.raises(TeacherError, match=r"one text tower(?s:.*)--teacher all"):
        write_student(run, str(tmp_path / "all"), teacher="all")
    with pytest.raises(TeacherError, match=r"no teacher 3; its teachers are:\n  1: (?s:.*)2: "):
        write_student(run, str(tmp_path / "third"), teacher="3")


@pytest.mark.slow
def test_an_export_says_which_teacher_it_has_the_text_tower_of(run: str, other: Clip, tmp_path: Path) -> None:
    out = tmp_path / "student"
    done = CliRunner().invoke(cli, ["export", run, "--out", str(out), "--teacher", "2"])
    assert done.exit_code == 0, done.output
    origin = read_export(str(out)).origin
    assert origin is not None
    assert origin.teacher_weights == distilled_from(str(out)) == other.identity.weights
    assert origin.more_teachers == ("local-dir:tiny",)
    assert [one.kind for one in origin.sources] == ["image", "text", "image", "text"]
    assert all(one.unknown is None for one in origin.sources)
    assert "further teacher" in (out / "README.md").read_text()


@pytest.mark.slow
def test_evaluation_measures_by_each_teacher_and_by_all(run: str, cifar10: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for words, name in (([], "two"), (["--teacher", "2"], "two-teacher-2"), (["--teacher", "all"], "two-teacher-all")):
        done = CliRunner().invoke(cli, ["evaluate", run, cifar10, *words, *out])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "out" / name / "results.jsonl").exists()


def test_a_teacher_that_hardly_counts_changes_next_to_nothing(
    image_store: Store, text_store: Store, config: Config, tmp_path: Path
) -> None:
    """But for rounding: the gradient of the trunk is a sum over the columns of all projections, in another order."""
    plain = tiny_config(image_store, text_store, tmp_path / "one", max_steps=4)
    train(plain)
    train(config(tmp_path / "two", max_steps=4, teacher_weights=(1, 1e-12)))
    one = weights(plain.out)
    two = of_columns(weights(tmp_path / "two"), read_run(str(tmp_path / "two")).student, 0, WIDTH)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_stopped_run_goes_on_to_the_same_bits(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "max_steps": 4, "checkpoint_every": 1, "loss": LossConfig(vl=0.7, pvl=0.3, queue=8, logit_scale="learned"),
        "accumulate": 2,
    }  # fmt: skip
    whole, save = config(tmp_path / "whole", **changes), Checkpoints.save
    train(whole)

    def save_and_stop(self: Checkpoints, step: int, *args: Any) -> None:
        save(self, step, *args)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    stopped = config(tmp_path / "stopped", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    with pytest.raises(MismatchError, match=r"teacher_weights: \[\] != \[1\.0, 2\.0\]"):
        train(replace(stopped, teacher_weights=(1.0, 2.0)))
    with pytest.raises(MismatchError, match=r"more_images_identity\.2: \w+ != None"):
        train(replace(stopped, more_images=(), more_texts=()))
    train(stopped)
    assert same(weights(whole.out), weights(stopped.out))


def test_the_first_teacher_is_validated(
    config: Config, cifar10: str, prompt_store: Store, clip: Clip, tmp_path: Path
) -> None:
    found = config(tmp_path / "run", max_steps=2, val=(cifar10,), val_texts=prompt_store.path, ema=0.5)
    result = train(found)
    assert result.validation.keys() == {"cifar10", "cifar10_ema"}
    images = open_folders((cifar10,))[0]
    classes_CD = class_embeddings(images.prompts(), clip.encode_texts)
    with open_model(found.out, device="cpu") as student:

        def answers(pixels_B3HW: torch.Tensor) -> torch.Tensor:
            return (student.encode_images(pixels_B3HW) @ classes_CD.T).argmax(dim=1)

        (right,), _ = count_correct(images, [answers], Preprocess(student.identity.preprocessing), 64)
    assert (
        abs(result.validation["cifar10"] * len(images.samples) - right) <= 2
    )  # embeddings were cached in half precision


def test_first_weights_are_those_of_the_tower_and_the_first_projection(config: Config, tmp_path: Path) -> None:
    state = build_student(student_spec(STUDENT, teacher_identity(embed_dim=WIDTH), 32)).state_dict()
    torch.save(state, tmp_path / "first.pt")
    found = config(tmp_path / "run", init=str(tmp_path / "first.pt"))
    inputs = open_inputs(found)
    run = plan_run(found, inputs, 1, machine="m", processes=1, order="blocks", allow_changes=(), done=0)
    tower = build_towers(found, run, inputs, Place(0, 1, torch.device("cpu")), {}, resumed=False)["image"].module
    assert same(of_columns(tower.state_dict(), run.student, 0, WIDTH), state)


def test_the_loss_is_the_weighted_sum_of_each_teachers_own() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher_BD, features_BD, text_TD = (torch.randn(rows, 10, generator=generator) for rows in (8, 8, 12))
    losses = [LossConfig(vl=0.7, pvl=0.3, scale=30), LossConfig(vl=0, pvl=0, cosine=1)]
    each = [
        Objective(loss, teacher_scale=100.0, dim=dim, mean_D=None) for loss, dim in zip(losses, (6, 4), strict=True)
    ]
    together = SeveralObjectives(each, [6, 4], [1.0, 0.25])
    unit = [F.normalize(features_BD[:, :6], dim=-1), F.normalize(features_BD[:, 6:], dim=-1)]
    student_BD = together.unit(features_BD)
    assert torch.equal(student_BD, torch.cat(unit, dim=1))
    found, shown = together(teacher_BD, student_BD, [text_TD[:, :6], None], [None, None])
    first, _ = each[0](teacher_BD[:, :6].contiguous(), unit[0], text_TD[:, :6])
    second, _ = each[1](teacher_BD[:, 6:].contiguous(), unit[1])
    torch.testing.assert_close(found, first + 0.25 * second)
    assert shown["teacher1_loss"] == first
    assert shown["teacher2_cosine"] == second


def test_rows_that_one_teacher_lacks_are_not_drawn(config: Config, tmp_path: Path) -> None:
    found = config(tmp_path / "run", max_steps=None, epochs=1)
    lacking = str(shutil.copytree(found.more_images[0], tmp_path / "lacking.zarr"))
    store = Store(lacking)
    arrays = {name: array.copy() for name, array in store.shard_arrays(0).items()}
    arrays["embedding"][5], arrays["status"][5] = 0, Status.NOT_FINITE
    failure = Failure(row=5, key="k", file="f", status=Status.NOT_FINITE.name, reason="made so")
    store.write_shard(0, arrays, [failure], device="cpu", seconds=1.0)
    found = replace(found, more_images=(lacking,), batch_size=19)
    assert rows_of_all([store, Store(found.images)]) is None
    with open_feed(found, Place(0, 1, torch.device("cpu"))) as feed:
        assert any("1 image of" in note and "will not be drawn" in note for note in notes_on_feed(found, feed))
        drawn = np.concatenate([batch.all_rows_G.numpy() for batch, _ in feed.batches])
    assert sorted(drawn) == [row for row in range(96) if row != 5]


def test_stores_of_other_rows_are_refused_with_the_first_that_differs(tmp_path: Path) -> None:
    keys = [f"k{row}" for row in range(8)]
    one, _ = random_store(tmp_path / "one", rows=8, shard_rows=4)
    again, _ = random_store(tmp_path / "again", rows=8, shard_rows=8, weights="v")
    swapped, _ = random_store(tmp_path / "swapped", rows=8, shard_rows=4, keys=[*keys[:5], "k6", "k5", "k7"])
    fewer, _ = random_store(tmp_path / "fewer", rows=6, shard_rows=4)
    require_same_images(one, again)
    with pytest.raises(MismatchError, match=r"one and .*swapped have other rows: row 5 is key 'k5' .* and key 'k6'"):
        require_same_images(one, swapped)
    for stores in ((one, fewer), (fewer, one)):
        with pytest.raises(MismatchError, match=r"row 6 is .*not there"):
            require_same_rows(*stores)
    texts, _ = random_store(tmp_path / "texts", rows=8, shard_rows=4, kind="text")
    lacking, _ = random_store(tmp_path / "lacking", rows=8, shard_rows=8, kind="text", failed=(2,), weights="v")
    require_same_sentences([texts, texts])
    with pytest.raises(MismatchError, match="row 2 has an embedding in only one of"):
        require_same_sentences([texts, lacking])


def test_views_of_all_teachers_must_be_the_same(tmp_path: Path) -> None:
    plan = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True)

    def with_views(name: str, views: ViewPlan | None, pixels: int | None = None) -> Store:
        store, _ = random_store(tmp_path / name, rows=4, shard_rows=4)
        store.schema = replace(store.schema, views=views, pixels=pixels)
        return store

    one = with_views("one", plan)
    require_same_images(one, with_views("more", replace(plan, count=5)))
    for name, views, pixels in (
        ("whole", None, None), ("seed", replace(plan, seed=1), None), ("small", plan, 64),
    ):  # fmt: skip
        with pytest.raises(MismatchError, match="saw different views of an image"):
            require_same_images(one, with_views(name, views, pixels))


def test_all_teachers_have_seen_the_view_that_the_student_sees(
    image_tar: Path, clip: Clip, other: Clip, tmp_path: Path
) -> None:
    plan = ViewPlan(count=2, seed=0, crop_scale=(0.4, 1.0), flip=True)
    stores = [
        cached("image", image_tar, tmp_path / f"{number}.zarr", teacher, views=replace(plan, count=count), pixels=48)
        for number, (teacher, count) in enumerate([(clip, 3), (other, 2)])
    ]
    rows_B = np.array([5, 90, 17])
    augmentation = Augmentation(size=32, crop_scale=(1.0, 1.0), flip=False, seed=0)
    batch = TrainingImages(stores[0], augmentation, more=stores[1:])[Request(0, 2, rows_B, rows_B)]
    assert isinstance(batch, Batch)
    views_B = (rows_B + 2) % 2  # of both stores
    expected = [store.gather_view(rows_B, views_B)[0] for store in stores]
    np.testing.assert_array_equal(batch.teacher_BD.numpy(), np.concatenate(expected, axis=1))
    pixels = TrainingImages(stores[1], augmentation)[Request(0, 2, rows_B, rows_B)]
    assert isinstance(pixels, Batch)
    assert torch.equal(batch.pixels_B3HW, pixels.pixels_B3HW)


def test_the_command_line_takes_a_store_for_each_teacher(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    stranger, _ = random_store(tmp_path / "stranger.zarr", rows=96, shard_rows=32)
    words = ["--images", image_store.path, "--images", stranger.path, "--texts", text_store.path]
    rest = ["--loss", "cosine=1,vl=1", "--recipe", "sample", "--out", str(tmp_path / "run")]
    said = CliRunner().invoke(cli, ["train-student", *words, *rest]).output
    assert f"{image_store.path} and {stranger.path} have other rows: row 0 is" in said
    again = ["--images", image_store.path, *words[:2], "--texts", text_store.path]
    same = CliRunner().invoke(cli, ["train-student", *again, *rest]).output
    assert "come from the same teacher" in same
    assert "more images of one teacher are --images A.zarr::B.zarr" in same
    swapped = ["--images", stranger.path, *words[:2], "--texts", text_store.path]
    assert "in the same order, those without" in CliRunner().invoke(cli, ["train-student", *swapped, *rest]).output
    lonely = CliRunner().invoke(cli, ["train-student", *words[:2], *rest]).output
    assert "Missing --texts" in lonely


def test_a_dry_run_counts_the_sentences_of_all_teachers(config: Config, tmp_path: Path) -> None:
    found = foresee(config(tmp_path / "run"))
    assert found.text_bank == 2 * 200 * (WIDTH + OTHER)
    assert found.seconds_per_step is not None
    assert not (tmp_path / "run").exists()


def test_settings_of_teachers_that_make_no_sense_are_refused(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for changes, said in (
        ({"teacher_weights": (1.0,)}, "one number for each of several teachers; 2 here, found 1"),
        ({"teacher_weights": (1.0, 0.0)}, "teacher_weights must be above 0"),
        ({"more_images": (), "more_texts": (), "teacher_scales": (50.0,)}, "several teachers; 1 here, found 1"),
        ({"more_images": ()}, "more text stores than image stores"),
        ({"texts": None, "more_texts": ()}, "teacher 1 has no text store, and the loss vl needs sentences"),
        ({"more_texts": ()}, "teacher 2 has no text store, and the loss vl needs sentences"),
        ({"text_student": "ViT-B-32"}, "distilled from one teacher, and there are several"),
        ({"images": "a.zarr::b.zarr"}, "several stores of one teacher, A.zarr::B.zarr, do not go with several"),
        ({"captions": "c", "loss": LossConfig(contrastive=1)}, "captions are encoded by one teacher, and there are"),
        ({"teacher_scales": (1.0, 1.0), "loss": LossConfig(logit_scale="teacher")}, "each teacher has its own"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=said):
            replace(config(out), **{"loss": LossConfig(vl=1, pvl=0), **changes})  # type: ignore[arg-type]


def test_without_sentences_a_teacher_has_the_losses_that_need_none(config: Config, tmp_path: Path) -> None:
    first, second = config(tmp_path / "run", more_texts=(), teacher_scales=(100, 40)).teacher_losses()
    assert first is not None
    assert second is not None
    assert (first.vl, second.vl, second.cosine, first.scale, second.scale) == (0.7, 0, 0.5, 100, 40)


def test_pairs_and_selections_need_the_same_sentences(
    config: Config, image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They name sentences by their rows in the first text store; random ones are drawn from each store by itself."""
    others, _ = random_store(
        tmp_path / "texts", rows=20, shard_rows=32, kind="text",
        **vars(Store(config(tmp_path).more_images[0]).schema.teacher),
    )  # fmt: skip
    plain = config(tmp_path / "run", more_texts=(others.path,))
    assert open_inputs(plain).more[0].texts is not None
    monkeypatch.setattr("dimefm.training.run_folder.Pairs", lambda path, cached: path)
    monkeypatch.setattr("dimefm.training.run_folder.require_pairs_match", lambda *_: None)
    with pytest.raises(MismatchError, match="have other rows: row 0 is text"):
        open_inputs(replace(plain, pairs="pairs", text_mix=TextMix(random=0, retrieved=1)))


@pytest.mark.parametrize(
    "name", [STUDENT, "test_vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ViT-S-32", "RN50"))]
)
def test_a_projection_for_all_teachers_is_that_of_each_side_by_side(name: str) -> None:
    spec = student_spec(name, teacher_identity(), embed_dim=24)
    narrow = build_student(replace(spec, embed_dim=16)).eval()
    wide = widened(narrow, spec).eval()
    parts = [build_student(replace(spec, embed_dim=width)).eval() for width in (16, 8)]
    for part, start in zip(parts, (0, 16), strict=True):
        part.load_state_dict(of_columns(wide.state_dict(), spec, start, part(_one(spec)).shape[1]))
    together = torch.cat([part(_one(spec)) for part in parts], dim=1)
    torch.testing.assert_close(wide(_one(spec)), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(narrow(_one(spec)), together[:, :16], rtol=0, atol=1e-5)


def _one(spec: Any) -> torch.Tensor:
    return torch.rand(1, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))


def test_a_student_without_a_plain_projection_is_refused() -> None:
    spec = student_spec(STUDENT, teacher_identity(), embed_dim=24)
    spec = replace(spec, vision_cfg={**spec.vision_cfg, "timm_proj": "mlp"})
    with pytest.raises(TrainingError, match="does not end in one linear projection"):
        widened(build_student(replace(spec, embed_dim=16)), spec)


def _train(rank: int, world: int, port: int, config: TrainConfig) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train(config)


@pytest.mark.slow
def test_two_processes_train_as_one(config: Config, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "student": "test_vit", "image_size": None, "device": "cpu", "max_steps": 4, "lr": 1e-3, "log_every": 1,
        "loss": LossConfig(vl=0.7, pvl=0.3, udist=0.1, cosine=0.5, centred=0.5, queue=8,
                           logit_scale="learned", scale=50),
    }  # fmt: skip
    train(config(tmp_path / "one", **changes))
    arguments = (2, free_port(), config(tmp_path / "two", **changes))
    multiprocessing.start_processes(_train, arguments, nprocs=2, start_method=FORKING.get_start_method())
    one, two = (read_metrics(str(tmp_path / run)) for run in ("one", "two"))
    assert len(one) == 4
    for name in one[0].keys() - {"event", "epoch", "images_per_second", "data_wait"}:
        np.testing.assert_allclose([line[name] for line in two], [line[name] for line in one], rtol=2e-3, err_msg=name)
