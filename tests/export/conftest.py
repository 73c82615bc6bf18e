"""A two-step run of a timm tower, its export, and an evaluation of it, shared by the tests of this room."""

import shutil
from pathlib import Path

import pytest

from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.export.export_student import export
from dimefm.store.embedding_store import Store
from dimefm.training.train import train
from tests.tiny_training import tiny_config


@pytest.fixture(scope="package")
def finished_run(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_config(image_store, text_store, out, max_steps=2, epochs=1))
    return out


@pytest.fixture(scope="package")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its student as an open_clip folder. Not to be written to."""
    out = tmp_path_factory.mktemp("exported") / "student"
    export(str(finished_run), str(out))
    return out


@pytest.fixture
def student(exported: Path, tmp_path: Path) -> Path:
    """A copy of it to write to."""
    return Path(shutil.copytree(exported, tmp_path / "student"))


@pytest.fixture(scope="package")
def evaluation(finished_run: Path, cifar10: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of the run on a labelled set. Not to be written to."""
    out = tmp_path_factory.mktemp("evaluations")
    evaluate(EvaluationConfig(model=str(finished_run), folders=(cifar10,), out=str(out), name="run"))
    return out / "run"
