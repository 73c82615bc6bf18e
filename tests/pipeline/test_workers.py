"""How many workers a job has, and what a dry run says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dimefm.caching.speed import Rates, teacher_seconds
from dimefm.cli import cli
from dimefm.errors import DimefmError
from dimefm.models.clip import load_clip
from dimefm.store.embedding_store import Store
from pipeline import cache_job
from pipeline import show_forecast as forecast_module
from pipeline import workers as workers_module
from pipeline.cache import CacheConfig, cache, dry_run
from pipeline.workers import choose_workers, require_cores
from tests.making import make_jpeg, write_tar


@pytest.mark.parametrize(
    ("cores", "gigabytes", "shards", "seconds", "weights", "expected"),
    [
        (2, 24, 11, 212, 0.04, 2),  # the sample
        (2, 24, 1, 212, 0.04, 1),  # a shard is the work of one
        (2, 24, 2, 29, 0.04, 1),  # the start takes as long as what it saves
        (2, 24, 2, 31, 0.04, 2),
        (64, 240, 600, 100, 0.04, 6),
        (96, 64, 600, 1e8, 1.7, 21),  # ViT-L/14 ninety-six times would be 260 GB
        (4, 1, 10, 5000, 1.7, 1),
    ],
)
def test_workers_are_bounded_by_work_shards_cores_and_memory(
    cores: int,
    gigabytes: int,
    shards: int,
    seconds: float,
    weights: float,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers_module, "cpus", lambda: cores)
    monkeypatch.setattr(workers_module, "available_memory", lambda: gigabytes * 10**9)
    found = choose_workers("cpu", shards=shards, weight_bytes=int(weights * 1e9), seconds=lambda: seconds)
    assert found == expected


def test_a_small_job_starts_no_ray_and_is_not_measured(
    image_tar: Path, teacher_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shards, on a machine of many cores."""
    monkeypatch.setattr(workers_module, "cpus", lambda: 8)
    monkeypatch.setattr("pipeline.ray_workers.cluster", lambda *_: pytest.fail("Ray was started for a second of work"))
    words = {"kind": "image", "sources": (str(image_tar),), "teacher": teacher_name, "device": "cpu", "shard_rows": 32}
    store = cache(CacheConfig(**words, out=str(tmp_path / "i.zarr")))  # type: ignore[arg-type]
    assert len(store.committed()) == 3
    monkeypatch.setattr(cache_job, "teacher_seconds", lambda *_: pytest.fail("measured for one shard"))
    one = cache(CacheConfig(**{**words, "shard_rows": 96}, out=str(tmp_path / "one.zarr")))  # type: ignore[arg-type]
    assert len(one.committed()) == 1


def test_the_teacher_is_timed_for_both_kinds(teacher_name: str) -> None:
    clip = load_clip(teacher_name, device="cpu")
    assert 0 < teacher_seconds("image", clip) < 5
    assert 0 < teacher_seconds("text", clip) < 5


def test_more_workers_than_cores_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "cpus", lambda: 2)
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg()})
    config = CacheConfig(
        kind="image", sources=(str(tar),), out=str(tmp_path / "o"), teacher="nowhere", device="cpu", workers=100
    )
    for call in (cache, dry_run):
        with pytest.raises(DimefmError, match=r"--workers 100: this machine has 2 cores(?s:.*)give --workers 2"):
            call(config)
    assert not (tmp_path / "o").exists()
    require_cores(2)
    require_cores(None)


def test_an_index_is_not_built_by_more_workers_than_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "cpus", lambda: 2)
    words = ["build-index", str(tmp_path / "t.zarr"), "--out", str(tmp_path / "o"), "--workers", "3"]
    assert "--workers 3: this machine has 2 cores" in CliRunner().invoke(cli, words).stderr


@pytest.fixture
def forecast_of(image_store: Store) -> forecast_module.Forecast:
    return forecast_module.Forecast(image_store.schema, 1000, [])


def test_a_dry_run_counts_start_up_and_no_worker_without_a_shard(forecast_of: forecast_module.Forecast) -> None:
    """96 rows in 3 shards, a row a second."""
    rates = Rates(load=2.0, teacher=2.0)
    show = forecast_module.show_forecast
    one = show(forecast_of, rates, device="cpu", workers=1, threads=1, remote=False, load=1)
    assert re.search(r"takes +1m36s at 1\.0 images/s with 1 worker of 1 decoding thread\n", one)
    assert re.search(r"start-up +about 6s before that\n", one)
    many = show(forecast_of, rates, device="cpu", workers=50, threads=1, remote=False, load=1)
    assert re.search(r"takes +32s at 3\.0 images/s with 3 workers of 1 decoding thread\n", many)
    assert re.search(r"start-up +about 22s before that, Ray and its workers with it\n", many)


def test_workers_that_share_a_gpu_are_no_faster_than_it(
    forecast_of: forecast_module.Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(forecast_module, "cpus", lambda: 4)
    rates = Rates(load=10.0, teacher=8.0)
    shown = forecast_module.show_forecast(
        forecast_of, rates, device="cuda", workers=3, threads=None, remote=False, load=1
    )
    assert re.search(r"takes +12s at 8\.0 images/s with 3 workers of 1 decoding thread\n", shown)


def test_a_slow_teacher_is_not_shown_as_no_images_a_second(forecast_of: forecast_module.Forecast) -> None:
    shown = forecast_module.show_forecast(
        forecast_of, Rates(load=500.0, teacher=0.04), device="cpu", workers=1, threads=1, remote=False, load=1
    )
    assert "one image in 25.0 s by the teacher on one core" in " ".join(shown.split())
    assert "0.0 image" not in shown


def test_a_dry_run_shows_the_teacher_as_info_does(forecast_of: forecast_module.Forecast) -> None:
    shown = forecast_module.show_forecast(
        forecast_of, Rates(load=1.0, teacher=1.0), device="cpu", workers=1, threads=1, remote=False, load=1
    )
    assert "{" not in shown
    assert re.search(r"preprocessing +\d+ x \d+ px, shortest, bicubic", shown)
