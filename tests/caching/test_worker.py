"""A job of one worker runs in the process of its command. How many workers there are: by rows, cores and memory."""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas.plan import PlannedImage
from dimefm.caching import image_loader
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.worker import SHARDS_AT_ONCE, Job, run_here
from dimefm.errors import DimefmError, StoreError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from pipeline.cache import CacheConfig, cache
from tests.processes import result_of


def here(words: dict[str, Any]) -> tuple[bool, int]:
    """Whether Ray is in a process that has cached, and the torch threads that it is left with."""
    import torch

    torch.set_num_threads(2)
    cache(CacheConfig(**words))
    return "ray" in sys.modules, torch.get_num_threads()


def test_few_rows_are_encoded_in_the_process_with_the_same_bytes_and_without_ray(
    image_store: Store, image_tar: Path, teacher_name: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "i.zarr")
    words = {"kind": "image", "sources": (str(image_tar),), "out": out, "teacher": teacher_name, "device": "cpu"}
    has_ray, threads = result_of(here, {**words, "shard_rows": 32, "batch_size": 16})
    assert not has_ray
    assert threads == 2
    np.testing.assert_array_equal(Store(out).read(0, 96), image_store.read(0, 96))
    assert [c.digest for c in Store(out).commits()] == [c.digest for c in image_store.commits()]


def test_of_two_shards_at_once_one_is_decoded_while_the_other_has_the_teacher(
    image_tar: Path, teacher_name: str, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where one fails, the job fails, and what was committed before stays."""
    monkeypatch.setitem(SHARDS_AT_ONCE, "cpu", 2)
    request = PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=16, batch_size=4)
    store = open_or_plan(request, str(tmp_path / "s.zarr"), clip.identity)
    seen, lock, encode, load = list[str](), threading.Lock(), Clip.encode_images, image_loader.read_image

    def teach(self: Clip, pixels: torch.Tensor) -> torch.Tensor:
        assert lock.acquire(blocking=False), "two shards have the teacher"
        seen.append("teacher")
        if len(seen) == 2:  # of the first shard: the second has begun to decode before the teacher is done with it
            assert decoded.wait(20)
        found = encode(self, pixels)
        lock.release()
        return found

    def read(image: PlannedImage, **options: Any) -> Any:
        if image.row >= 16:
            decoded.set()
        if image.row == 60:
            raise StoreError("the storage does not answer")
        return load(image, **options)

    decoded, threads = threading.Event(), set(threading.enumerate())
    monkeypatch.setattr(Clip, "encode_images", teach)
    monkeypatch.setattr(image_loader, "read_image", read)
    job = Job(store=store.path, teacher=teacher_name, pretrained=None, precision="fp32", device="cpu", threads=1)
    with pytest.raises(StoreError, match="does not answer"):
        run_here(job, clip)
    assert {0, 1} <= store.committed() <= {0, 1, 2, 4, 5}
    assert not [t for t in set(threading.enumerate()) - threads if t.name.startswith("ThreadPoolExecutor")]


def test_measuring_is_a_small_part_of_a_small_job(
    image_tar: Path, teacher_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 96 images on a CPU, the teacher sees a few a second and a third time, to choose the decoding threads."""
    seen, encode = list[int](), Clip.encode_images

    def counted(self: Clip, pixels: Any) -> Any:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Clip, "encode_images", counted)
    words: dict[str, Any] = {"kind": "image", "sources": (str(image_tar),), "teacher": teacher_name, "device": "cpu"}
    cache(CacheConfig(**words, out=str(tmp_path / "i.zarr"), workers=1))
    assert 96 <= sum(seen) <= 96 + 8


def started(folder: str) -> str:
    """Why Ray does not start in a folder."""
    from pipeline.ray_cluster import cluster

    os.environ["RAY_TMPDIR"] = folder
    try:
        with cluster(None, 1, "cpu"):
            return "started"
    except DimefmError as error:
        return str(error)


def test_a_folder_that_does_not_serve_ray_is_named_with_the_remedy(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    assert "too long in" in (said := result_of(started, str(long)))
    assert "RAY_TMPDIR=/tmp" in said
    (tmp_path / "ray").write_text("another user's, or as here no folder")
    assert f"{tmp_path / 'ray'}: File exists" in (said := result_of(started, str(tmp_path)))
    assert "--workers 1, which needs no Ray" in said


def here_beside_a_gpu(words: dict[str, Any]) -> bool:
    """Whether a process has touched the GPU that torch says is there."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was started"))
        cache(CacheConfig(**words))
    return torch.cuda.is_initialized()


def test_a_worker_on_the_cpu_leaves_the_gpu_alone(image_tar: Path, teacher_name: str, tmp_path: Path) -> None:
    out = str(tmp_path / "i.zarr")
    words = {"kind": "image", "sources": (str(image_tar),), "out": out, "teacher": teacher_name, "device": "cpu"}
    assert not result_of(here_beside_a_gpu, {**words, "workers": 1, "batch_size": 16})
    assert Store(out).committed() == {0}


# -- who else may talk to it ------------------------------------------------------------------------------------------


def _listening(token: str) -> set[str]:
    """The addresses, as /proc has them, that this process listens on and those that know the token."""
    sockets = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.name == str(os.getpid()) or token.encode() in (folder / "environ").read_bytes():
                sockets |= {os.readlink(file) for file in (folder / "fd").iterdir()}  # noqa: PTH115  # no path
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


def _token() -> tuple[str, str]:
    return os.environ.get("RAY_AUTH_MODE", ""), os.environ.get("RAY_AUTH_TOKEN", "")


def _a_local_ray(home: str) -> tuple[set[str], tuple[str, str], bool]:
    """Where it listens, the token of its workers, and whether nothing of that is left when it has ended."""
    import ray
    from ray._private import ray_constants

    from pipeline.ray_cluster import cluster

    os.environ["HOME"], before = home, _token()
    with cluster(None, 1, "cpu"):
        token = ray.get(ray.remote(_token).remote())
        where = _listening(token[1])
    return where, token, _token() == before and ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.slow
def test_a_local_ray_is_closed_to_others(tmp_path: Path) -> None:
    """On a shared machine or network, whoever reaches it could run code as this user."""
    where, (mode, token), nothing_left = result_of(_a_local_ray, str(tmp_path))
    assert where <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also as IPv6 writes it
    assert where
    assert (mode, len(token)) == ("token", 64)
    assert nothing_left
    assert not list(tmp_path.rglob("*auth*"))
