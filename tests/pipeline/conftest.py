"""One local Ray for all tests here: to start one takes seconds."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from pipeline import ray_cluster, ray_shards, ray_workers


@pytest.fixture(scope="package")
def shared_ray() -> Iterator[None]:
    """It believes that there are two GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # or Ray would find that there are none
        patch.setattr("torch.cuda.device_count", lambda: 2)
        with ray_cluster.cluster(None, 2, "cuda"):
            patch.undo()
            yield


@pytest.fixture
def one_ray(shared_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would start a Ray of its own, or join one, finds the shared one."""
    for module in (ray_workers, ray_shards):
        monkeypatch.setattr(module, "cluster", lambda *_: nullcontext())
