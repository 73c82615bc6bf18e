"""The training loop: it learns, it goes on exactly where it was, it refuses what does not fit."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas import StudentSpec
from cache_schemas.document import CHECKSUM, digest_of
from dimefm.errors import MismatchError, OutputExistsError, StoreError, TrainingError
from dimefm.images.preprocess import Preprocess
from dimefm.models.towers import build_student, student_spec
from dimefm.store.embedding_store import Store
from dimefm.system.lock import writing
from dimefm.training import build_towers
from dimefm.training import train as train_module
from dimefm.training.batch_loader import Requests, explain_reader_death, training_loader
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.distributed import Place
from dimefm.training.image_batches import Augmentation, TrainingImages
from dimefm.training.machine_settings import decide_settings
from dimefm.training.read_metrics import last_validation, read_metrics
from dimefm.training.row_order import Order
from dimefm.training.run_folder import read_run, write_run
from dimefm.training.train import train
from dimefm.training.validation import Validation
from tests.making import read_tar, write_tar
from tests.stores import random_store
from tests.tiny_training import STEPS, STUDENT, same, tiny_config, weights


@pytest.fixture(scope="module")
def undisturbed(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(tiny_config(image_store, text_store, out))
    return out


SAVE = Checkpoints.save


def interrupted_at(stop: int) -> Callable[..., None]:
    """Checkpoints.save with a kill after that of step `stop`."""

    def save_and_stop(self: Checkpoints, step: int, *args: Any) -> None:
        SAVE(self, step, *args)
        if step == stop:
            raise KeyboardInterrupt

    return save_and_stop


def test_a_student_learns_the_teachers_embeddings(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(
        image_store, text_store, tmp_path / "run", loss=LossConfig(vl=0, pvl=0, centred=1), epochs=20, max_steps=60,
        log_every=1, crop_scale=(0.9, 1.0),
    )  # fmt: skip
    train(config)
    losses = [line["loss"] for line in read_metrics(config.out) if line["event"] == "train"]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])


def test_run_folder_holds_config_metrics_events_and_checkpoints(undisturbed: Path, image_store: Store) -> None:
    run = read_run(str(undisturbed))
    assert run.images_identity == image_store.schema.identity
    assert run.steps == STEPS
    assert TrainConfig.parse(run.config, "run.json").loss.udist == 0.1
    train_lines = [line for line in read_metrics(str(undisturbed)) if line["event"] == "train"]
    assert [line["step"] for line in train_lines] == [2, 4, 6, 8]
    assert {"loss", "vl", "pvl", "udist", "cosine", "centred", "lr", "images_per_second"} <= train_lines[0].keys()
    assert list(undisturbed.glob("events.out.tfevents.*"))
    assert Checkpoints(str(undisturbed)).step() == STEPS


@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 5))])
def test_resume_gives_the_same_weights_to_the_last_bit(
    undisturbed: Path, image_store: Store, text_store: Store, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", checkpoint_every=1)
    monkeypatch.setattr(Checkpoints, "save", interrupted_at(stop))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert Checkpoints(config.out).step() == stop
    train(config)
    assert same(weights(undisturbed), weights(config.out))
    steps = [line["step"] for line in read_metrics(config.out) if line["event"] == "train"]
    assert steps == sorted(set(steps)), "a line of metrics appears twice after a resume"


def test_an_older_run_goes_on_as_it_began(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its order of rows and with its groups of weight decay, of which its run.json has no word."""
    config = tiny_config(
        image_store, text_store, tmp_path / "run", student="test_vit", image_size=None, checkpoint_every=1,
        weight_decay=0.5, max_steps=4, loss=LossConfig(vl=0, pvl=0, cosine=1),
    )  # fmt: skip
    new = replace(config, out=str(tmp_path / "new"))
    train(new)
    assert (read_run(new.out).order, read_run(new.out).undecayed) == ("blocks", "listed")
    plan = train_module.plan_run
    with monkeypatch.context() as older:
        older.setattr("dimefm.training.feed_plan.choose_order", lambda *_: "chunks")
        older.setattr(train_module, "plan_run", lambda *words, **more: replace(plan(*words, **more), undecayed="named"))
        undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
        train(undisturbed)
        older.setattr(Checkpoints, "save", interrupted_at(2))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    path = Path(config.out, "run.json")
    document = json.loads(path.read_text())
    for name in ("order", "undecayed", "processes"):
        del document[name]
    document[CHECKSUM] = digest_of({name: value for name, value in document.items() if name != CHECKSUM})
    path.write_text(json.dumps(document))
    train(config)
    assert same(weights(undisturbed.out), weights(config.out))
    assert not same(weights(new.out), weights(config.out))
    run = read_run(config.out)
    assert (run.order, run.undecayed, run.processes, run.changes) == ("chunks", "named", None, ())


def test_another_number_of_processes_is_recorded_and_said(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", checkpoint_every=1)
    monkeypatch.setattr(Checkpoints, "save", interrupted_at(3))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert read_run(config.out).processes == 1
    write_run(config.out, replace(read_run(config.out), processes=4))
    _, notes = decide_settings(config, Place(0, 1, torch.device("cpu")), ())
    assert any("began with 4 processes and continues with 1: batches and losses are the same" in note for note in notes)
    train(config)
    run = read_run(config.out)
    assert [(change.step, change.field, change.values) for change in run.changes] == [(3, "processes", "4 != 1")]
    assert run.processes == 1


def test_the_number_of_workers_does_not_change_the_student(
    undisturbed: Path, image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", workers=2)
    train(config)
    assert same(weights(undisturbed), weights(config.out))


def test_another_seed_gives_another_student(
    undisturbed: Path, image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", seed=1)
    train(config)
    assert not same(weights(undisturbed), weights(config.out))


def test_a_finished_run_is_left_as_it_is(image_store: Store, text_store: Store, undisturbed: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns
        for p in undisturbed.rglob("*")
        if p.is_file() and "tfevents" not in p.name and p.name != ".lock"
    }
    result = train(tiny_config(image_store, text_store, undisturbed))
    after = {p: p.stat().st_mtime_ns for p in before}
    assert result.steps == STEPS
    assert {p.name for p in before if before[p] != after[p]} <= {"metrics.jsonl"}


def test_a_changed_config_is_refused_by_field(image_store: Store, text_store: Store, undisturbed: Path) -> None:
    config = tiny_config(image_store, text_store, undisturbed, lr=1e-5, batch_size=8)
    with pytest.raises(MismatchError) as caught:
        train(config)
    assert "lr: 0.004 != 1e-05" in str(caught.value)
    assert "batch_size: 16 != 8" in str(caught.value)


def test_a_start_that_failed_before_its_first_checkpoint_may_be_repeated_otherwise(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", init="nowhere.pt", max_steps=1)
    with pytest.raises(TrainingError, match="is no file"):
        train(config)
    train(replace(config, init=None, lr=1e-3))
    assert TrainConfig.parse(read_run(config.out).config, "run.json").lr == 1e-3


def test_frozen_statistics_are_those_of_the_first_weights(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    tower = build_student(student_spec(STUDENT, image_store.schema.teacher, 32))
    for name, buffer in tower.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    first = {name: value.clone() for name, value in tower.state_dict().items()}
    torch.save(first, tmp_path / "first.pt")
    config = tiny_config(
        image_store, text_store, tmp_path / "run", init=str(tmp_path / "first.pt"), batch_norm="frozen", max_steps=2
    )
    train(config)
    train(replace(config, max_steps=4), allow_changes=("max_steps",))
    found = weights(config.out)
    statistics = [name for name, _ in tower.named_buffers()]
    assert statistics
    assert all(torch.equal(found[name], first[name]) for name in statistics)
    assert not torch.equal(found["trunk.conv1.1.weight"], first["trunk.conv1.1.weight"]), "its scale is not trained"
    vit = replace(config, out=str(tmp_path / "vit"), student="test_vit", image_size=None)
    with pytest.raises(TrainingError, match="test_vit has no batch norm to be frozen"):
        train(vit)


def test_two_runs_in_one_folder_are_refused(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run")
    with writing(config.out), pytest.raises(StoreError, match="is being written by process"):
        train(config)


def test_validation_scores_every_set_and_picks_the_best(
    cifar10: str, image_store: Store, text_store: Store, prompt_store: Store, tmp_path: Path
) -> None:
    config = tiny_config(
        image_store, text_store, tmp_path / "run", val=(cifar10,),
        val_texts=prompt_store.path, max_steps=2, epochs=1, val_every=1,
    )  # fmt: skip
    result = train(config)
    assert result.validation.keys() == {"cifar10"}
    assert 0.02 < result.validation["cifar10"] < 0.4
    assert last_validation(config.out) == result.validation
    assert Checkpoints(config.out).step("best") == 2


class Watching(torch.nn.Module):
    """A tower that notes how many images it was given, and in what precision it computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.seen = torch.nn.Linear(3 * 32 * 32, width), list[tuple[int, torch.dtype]]()

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        assert not self.training
        features: torch.Tensor = self.project(images_B3HW.flatten(1))
        self.seen.append((len(features), features.dtype))
        return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_of_validation_is_decoded_once_for_all_towers_and_seen_in_the_runs_precision(
    cifar10: str, prompt_store: Store, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = Preprocess.__call__
    monkeypatch.setattr(Preprocess, "__call__", lambda self, data: decoded.append(1) or decode(self, data))
    place = Place(0, 1, torch.device("cpu"))
    spec = student_spec(STUDENT, prompt_store.schema.teacher, 32)
    towers = [Watching(spec.embed_dim).train() for _ in range(2)]
    validation = Validation((cifar10,), prompt_store, spec, place, dtype)
    decoded.clear()  # of the image that shows that the set can be read
    scores = validation.run({"": (towers[0], None), "_ema": (towers[1], None)})
    assert scores.keys() == {"cifar10", "cifar10_ema"}
    assert len(decoded) == 200
    for tower in towers:
        assert sum(count for count, _ in tower.seen) == 200
        assert {found for _, found in tower.seen} == {dtype}
        assert tower.training, "left in another mode"


def test_what_of_a_validation_set_cannot_be_read_is_said_once(
    cifar10: str, prompt_store: Store, tmp_path: Path
) -> None:
    for name in ("classnames.txt", "templates.txt"):
        (tmp_path / name).write_bytes((Path(cifar10) / name).read_bytes())
    members = read_tar(Path(cifar10) / "test-00000.tar", 2 * 3)
    broken = next(name for name in members if not name.endswith(".cls"))
    write_tar(tmp_path / "0.tar", {**members, broken: b"x", "more.json": b"{}"})
    spec = student_spec(STUDENT, prompt_store.schema.teacher, 32)
    validation = Validation((str(tmp_path),), prompt_store, spec, Place(0, 1, torch.device("cpu")), torch.float32)
    tower = {"": (Watching(spec.embed_dim), None)}
    notes = validation.take_notes()
    assert f"--val {tmp_path.name}: members of tars that end in .json: 1, {tmp_path}/0.tar: more.json" in notes
    few = "the best checkpoint is chosen by 3 images, too few to tell checkpoints apart that are nearly as good"
    assert notes[-1] == f"--val: {few}"
    validation.run(tower)
    assert validation.take_notes() == [f"--val {tmp_path.name}: 1 of 3 images cannot be read, and count as wrong"]
    validation.run(tower)
    assert validation.take_notes() == []


def test_prompts_that_were_not_cached_are_named(
    cifar10: str, image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", val=(cifar10,))
    with pytest.raises(MismatchError, match=r"(?s)lacks \d+ of \d+ prompts.*cache-texts"):
        train(replace(config, val_texts=text_store.path))


def test_stores_of_different_teachers_are_refused(tmp_path: Path) -> None:
    images, _ = random_store(tmp_path / "i.zarr", rows=64, shard_rows=32)
    texts, _ = random_store(tmp_path / "t.zarr", rows=64, shard_rows=32, kind="text", weights="other")
    with pytest.raises(MismatchError, match=r"teacher.weights: w != other"):
        train(tiny_config(images, texts, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_unfinished_store_is_refused(image_store: Store, tmp_path: Path) -> None:
    texts, _ = random_store(tmp_path / "t.zarr", rows=64, shard_rows=32, kind="text")
    (Path(texts.path) / "commits" / "000000.json").unlink()
    with pytest.raises(StoreError, match="unfinished"):
        train(tiny_config(image_store, texts, tmp_path / "run"))


def test_a_folder_of_something_else_is_refused(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"thesis.tex"):
        train(tiny_config(image_store, text_store, tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_batch_larger_than_the_store_is_refused(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="a batch of 1,000 images is more than the 96 with an embedding"):
        train(tiny_config(image_store, text_store, tmp_path / "run", batch_size=1000))


def test_not_a_number_stops_the_run_at_its_step(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", lr=1e30, warmup_epochs=0)
    with pytest.raises(TrainingError, match=r"step \d+: loss nan"):
        train(config)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_gone_is_named(text_store: Store, tmp_path: Path, workers: int) -> None:
    """The plan of a random store names a file "f" that is not there; a worker says so as this process would."""
    store, _ = random_store(tmp_path / "s.zarr", rows=32, shard_rows=32)
    augmentation = Augmentation(size=32, crop_scale=(0.5, 1), flip=True, seed=0)
    requests = Requests(Order(store=store, seed=0, batch_size=8), first=0, steps=4)
    loader = training_loader(TrainingImages(store.path, augmentation), requests, workers)
    with pytest.raises(TrainingError, match=r"^row \d+ \(key 'k\d+' in f\).*cannot be read now"):
        next(loader)


# torch raises the death of a reader from a signal handler: now and then within a callback, where it is only warned of.
a_reader_dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@a_reader_dies
def test_a_worker_that_dies_ends_the_run_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingImages, "_batch", lambda self, request: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds between two looks at it
    store, _ = random_store(tmp_path / "s.zarr", rows=32, shard_rows=32)
    augmentation = Augmentation(size=32, crop_scale=(0.5, 1), flip=True, seed=0)
    requests = Requests(Order(store=store, seed=0, batch_size=8), first=0, steps=4)
    loader = training_loader(TrainingImages(store.path, augmentation), requests, 1)
    with pytest.raises(TrainingError, match=r"a process that decodes images died"), explain_reader_death():
        next(loader)


@a_reader_dies
def test_the_row_that_a_worker_died_of_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimefm.training.image_batches.read_encoded", lambda *_: signal.raise_signal(signal.SIGSEGV))
    store, _ = random_store(tmp_path / "s.zarr", rows=32, shard_rows=32)
    augmentation = Augmentation(size=32, crop_scale=(0.5, 1), flip=True, seed=0)
    requests = Requests(Order(store=store, seed=0, batch_size=8), first=0, steps=1)
    (request,) = requests
    loader = training_loader(TrainingImages(store.path, augmentation), requests, 2)
    with (
        pytest.raises(TrainingError, match=rf"died(?s:.*) It was reading row {request.rows_B[0]}\n"),
        explain_reader_death(),
    ):
        next(loader)
    loader.close()


@a_reader_dies
def test_a_worker_that_dies_as_it_hands_a_batch_over_is_no_other_error(tmp_path: Path) -> None:
    """Its tensors are fetched through a connection to it; errors of other files stay what they are."""
    with pytest.raises(TrainingError, match=r"a process that decodes images died"), explain_reader_death():
        Client(str(tmp_path / "nobody"))
    with pytest.raises(FileNotFoundError), explain_reader_death():
        (tmp_path / "nothing").read_bytes()


def test_resume_is_exact_for_a_tower_that_draws_random_numbers(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stochastic depth draws from torch's global generator at every step."""
    build = build_towers.build_student

    def with_dropout(spec: StudentSpec) -> torch.nn.Module:
        return torch.nn.Sequential(build(spec), torch.nn.Dropout(0.3))

    monkeypatch.setattr(build_towers, "build_student", with_dropout)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(image_store, text_store, whole, checkpoint_every=1, max_steps=4))
    monkeypatch.setattr(Checkpoints, "save", interrupted_at(2))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(image_store, text_store, parts, checkpoint_every=1, max_steps=4))
    monkeypatch.setattr(Checkpoints, "save", SAVE)
    train(tiny_config(image_store, text_store, parts, checkpoint_every=1, max_steps=4))
    assert same(weights(whole), weights(parts))


def test_a_start_that_was_killed_at_once_is_repeated(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    """What a kill can leave before run.json: an empty folder, and an unfinished file of ours."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.0.unfinished").write_text("{")
    train(tiny_config(image_store, text_store, tmp_path / "run", max_steps=1))
    assert Checkpoints(str(tmp_path / "run")).step() == 1


def test_the_best_checkpoint_is_one_that_was_validated(
    cifar10: str,
    image_store: Store,
    text_store: Store,
    prompt_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr("dimefm.training.validation.Validation.run", lambda *_: {"cifar10": next(scores)})
    config = tiny_config(
        image_store, text_store, tmp_path / "run", val=(cifar10,),
        val_texts=prompt_store.path, val_every=0.5, max_steps=8, checkpoint_every=5,
    )  # fmt: skip
    train(config)
    assert Checkpoints(config.out).step("best") == 3  # 6 steps an epoch, validated every 3
    assert (Path(config.out) / "checkpoints" / "step-00000003.pt").exists()


def test_swapped_stores_are_refused(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="holds text embeddings where image embeddings belong"):
        train(tiny_config(text_store, image_store, tmp_path / "run"))
    with pytest.raises(MismatchError, match="holds image embeddings where text embeddings belong"):
        train(tiny_config(image_store, image_store, tmp_path / "run"))


def test_pairs_that_would_not_be_used_are_refused(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="neither the text mix nor the loss draws from them"):
        tiny_config(image_store, text_store, tmp_path / "run", pairs="pairs.zarr")


def test_a_run_cannot_go_to_a_url(image_store: Store, text_store: Store) -> None:
    config = replace(tiny_config(image_store, text_store, Path("x")), out="s3://bucket/run")
    with pytest.raises(StoreError, match="a run folder must be a local path"):
        train(config)


def test_settings_that_make_no_sense_are_all_named(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        tiny_config(image_store, text_store, tmp_path, epochs=0, crop_scale=(0.5, 1.5), loss=LossConfig(vl=0, pvl=0))
    for part in ("epochs must be above 0", "crop_scale", "every loss has weight 0"):
        assert part in str(caught.value)


def test_metrics_survive_a_line_cut_off_by_a_kill(tmp_path: Path) -> None:
    line = json.dumps({"event": "train", "step": 1, "loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"event": "tra')
    assert read_metrics(str(tmp_path)) == [{"event": "train", "step": 1, "loss": 0.5}]


def test_bf16_and_channels_last_train_too(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", precision="bf16", max_steps=2)
    train(config)
    assert all(torch.isfinite(value.float()).all() for value in weights(config.out).values())
