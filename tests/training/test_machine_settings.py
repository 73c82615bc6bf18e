"""What a run leaves to the machine is decided once, kept by run.json, and said where it does not suit."""

import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cache_schemas import digest_of
from cache_schemas.document import CHECKSUM
from dimefm.errors import MismatchError, TrainingError
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.training import machine_settings
from dimefm.training.batch_loader import explain_reader_death
from dimefm.training.distributed import find_place
from dimefm.training.machine_settings import choose_loaders
from dimefm.training.run_folder import read_run, write_run
from dimefm.training.train import train
from tests.processes import result_of
from tests.tiny_training import STEPS, tiny_config


def _machine(monkeypatch: pytest.MonkeyPatch, precision: str, name: str) -> None:
    """Another machine, as far as decisions go."""
    monkeypatch.setattr(machine_settings, "choose_precision", lambda device: precision)
    monkeypatch.setattr("dimefm.training.train.describe", lambda device: name)
    monkeypatch.setattr(machine_settings, "describe", lambda device: name)


def test_a_run_that_goes_on_elsewhere_keeps_what_it_began_with(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = tiny_config(image_store, text_store, tmp_path / "run", precision="auto", threads=None, epochs=2)
    _machine(monkeypatch, "bf16", "one kind")
    train(replace(config, max_steps=2))
    begun = read_run(config.out)
    assert begun.config["precision"] == "bf16"
    assert begun.config["threads"] == torch.get_num_threads()
    assert begun.machine == "one kind"

    _machine(monkeypatch, "fp32", "another kind")
    capfd.readouterr()
    train(replace(config, max_steps=4), allow_changes=("max_steps",))
    said = capfd.readouterr().err
    assert "precision stays bf16" in said
    assert "--allow-changes precision" in said
    assert "began on one kind and continues on another kind" in said
    changes = {change.field: change.values for change in read_run(config.out).changes}
    assert changes["machine"] == "one kind != another kind"
    assert read_run(config.out).config["precision"] == "bf16"

    train(replace(config, max_steps=6), allow_changes=("max_steps", "precision"))
    assert read_run(config.out).config["precision"] == "fp32"
    with pytest.raises(MismatchError, match="precision: fp32 != bf16"):
        train(replace(config, max_steps=6, precision="bf16"))
    with pytest.raises(MismatchError, match="threads: "):
        train(replace(config, max_steps=6, threads=torch.get_num_threads() + 1))


def test_more_loader_processes_than_cores_are_named(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_settings, "cpus", lambda: 2)
    config = tiny_config(image_store, text_store, tmp_path / "run")
    place = find_place("cpu")
    _, few = machine_settings.decide_settings(replace(config, workers=2), place, ())
    _, many = machine_settings.decide_settings(replace(config, workers=3), place, ())
    assert not [note for note in few if "--workers" in note]
    assert "--workers 3: more processes that read images than cores here (2)" in many


def test_a_run_from_before_threads_were_recorded_goes_on(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run")
    train(replace(config, max_steps=2))
    path = str(tmp_path / "run" / "run.json")
    document = storage.read_json(path)
    del document["config"]["threads"], document["machine"]
    document[CHECKSUM] = digest_of({name: value for name, value in document.items() if name != CHECKSUM})
    storage.write_json(path, document)
    train(replace(config, max_steps=STEPS), allow_changes=("max_steps",))
    assert [change.field for change in read_run(config.out).changes] == ["max_steps", "steps"]


def test_batch_norm_is_over_all_processes_but_in_older_runs(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    config, place = tiny_config(image_store, text_store, tmp_path / "run"), find_place("cpu")
    train(replace(config, max_steps=2))
    assert read_run(config.out).config["batch_norm"] == "sync"
    path = str(tmp_path / "run" / "run.json")
    document = storage.read_json(path)
    del document["config"]["batch_norm"]
    document[CHECKSUM] = digest_of({name: value for name, value in document.items() if name != CHECKSUM})
    storage.write_json(path, document)
    write_run(config.out, replace(read_run(config.out), processes=2))
    found, notes = machine_settings.decide_settings(config, place, ())
    assert found.batch_norm == "local"
    assert any(
        "began with 2 processes" in note and "batch norm, drop-path and dropout differ" in note for note in notes
    )
    found, notes = machine_settings.decide_settings(config, place, ("batch_norm",))
    assert found.batch_norm == "sync"
    assert not any("batch norm" in note for note in notes)
    with pytest.raises(MismatchError, match="batch_norm: local != sync"):
        train(replace(config, max_steps=2, batch_norm="sync"))
    train(replace(config, max_steps=2))
    assert [change.field for change in read_run(config.out).changes] == ["processes"]


def test_threads_are_what_the_config_says_and_only_for_the_run(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(
        "dimefm.training.train._Trainer._validate", lambda self: seen.append(torch.get_num_threads()) or {}
    )
    monkeypatch.setattr("dimefm.training.train.open_validation", lambda *_: SimpleNamespace(take_notes=list))
    train(tiny_config(image_store, text_store, tmp_path / "run", threads=before + 1, max_steps=1, val=("any",)))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("cores", "ranks", "device", "expected"),
    [(2, 1, "cpu", 1), (64, 1, "cpu", 8), (2, 1, "cuda", 1), (32, 4, "cuda", 7), (256, 8, "cuda", 16)],
)
def test_loader_processes_follow_cores_ranks_and_device(
    cores: int, ranks: int, device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_settings, "cpus", lambda: cores)
    monkeypatch.setattr(machine_settings, "processes_here", lambda: ranks)
    assert choose_loaders(None, device, 1000) == (expected, 4)
    assert choose_loaders(3, device, 1000) == (3, 4)
    assert choose_loaders(0, device, 1000)[0] == 0


def test_a_small_dev_shm_means_fewer_batches_ahead_then_fewer_processes_then_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine_settings, "cpus", lambda: 8)
    monkeypatch.setattr(machine_settings, "free_shared_memory", lambda: 64_000_000)
    assert choose_loaders(2, "cuda", 8_000_000) == (2, 3)
    assert choose_loaders(None, "cuda", 8_000_000) == (4, 1)
    with pytest.raises(TrainingError, match=r"/dev/shm has 64.0 MB left, and 2 .* need 192.0 MB.*\n.*--shm-size"):
        choose_loaders(2, "cuda", 48_000_000)
    with pytest.raises(TrainingError, match="--shm-size"):
        choose_loaders(None, "cuda", 48_000_000)
    assert choose_loaders(0, "cuda", 48_000_000)[0] == 0


def test_large_batches_are_not_read_ahead_by_the_dozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 processes would have 49 GB of the paper's whole batch in /dev/shm."""
    monkeypatch.setattr(machine_settings, "free_shared_memory", lambda: 10**12)
    monkeypatch.setattr(machine_settings, "available_memory", lambda: 4 * 10**12)
    size = 3 * 224**2
    assert [choose_loaders(16, "cuda", images * size)[1] for images in (128, 640, 5120)] == [4, 2, 2]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
         "ulimit -n"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_2>: No space left on device"), "--shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. out of shared memory"), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "often memory"),
    ],
)  # fmt: skip
def test_what_torch_says_of_its_loader_has_a_remedy(error: Exception, remedy: str) -> None:
    with pytest.raises(TrainingError, match=remedy), explain_reader_death():
        raise error


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(5, "Input/output error")):
        with pytest.raises(type(error)), explain_reader_death():
            raise error


def few_files(config: object, most: int) -> str:
    """Trains with loader processes where so many files may be open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        train(config)  # type: ignore[arg-type]
    except TrainingError as error:
        return str(error)
    return "trained"


def test_too_few_open_files_have_a_remedy(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", workers=2, max_steps=2)
    said = result_of(few_files, config, 60)
    assert "2 loader processes need more open files than this process may have (60)" in said
    assert "ulimit -n" in said
    assert result_of(few_files, config, 128) == "trained"
