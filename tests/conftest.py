"""What many tests share: the shipped sample, a tiny teacher, and three small stores made with it without Ray.

What takes seconds to import is imported within functions: the process that hands out the tests (make test) needs none
of it, and those that run them begin only once it has read this file.
"""

from __future__ import annotations

import gc
import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dimefm.sample import sample_dir
from tests.disks import Disk

if TYPE_CHECKING:
    from dimefm.models.clip import Clip
    from dimefm.store.embedding_store import Store

IMAGES, SENTENCES, SHARD_ROWS = 96, 200, 32


def pytest_configure(config: pytest.Config) -> None:
    """GPUs are for `-m gpu` alone. Warnings of libraries that cannot be helped would, as errors, fail whatever test
    runs at that moment."""
    if not wants_gpus(config.option.markexpr):
        # Before anything asks for one; processes that tests start, Ray's and xdist's too, inherit it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What a test has left over, such as a session of onnxruntime, waits for its threads as it is collected; a forked
    # process does not have them, and would wait for ever. So it collects nothing that it has not made itself.
    os.register_at_fork(after_in_child=gc.freeze)
    # torch 2.11's own compiler still uses what that release calls deprecated.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
    # zarr's file systems at s3:// have a session of their own, which the garbage collector ends at any later moment.
    config.addinivalue_line("filterwarnings", "ignore:Unclosed c:ResourceWarning")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import tests.tiny_clip  # noqa: F401  # torch and open_clip, here, where what they warn of is no error


def wants_gpus(expression: str) -> bool:
    """Whether -m chooses tests with the mark gpu. All others expect a machine without one: what chooses its own device
    must compute on the CPU, where sums come out the same everywhere."""
    return "gpu" in re.sub(r"not\s+gpu", "", expression).replace("(", " ").replace(")", " ").split()


# The files that take longest come first, so that both processes end at about the same time.
_FIRST = (
    "test_reproduce",
    "test_kill",
    "test_cluster",
    "test_ray_workers",
    "test_faults",
    "test_s3",
    "test_faiss_index",
    "test_train",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes run the tests (make test), a file in one of them, since its tests share what it sets up."""
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


@pytest.fixture(autouse=True, scope="session")
def _one_thread_for_fixtures() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """So that sums are made in the same order in every test, whatever number a command in one before it has set."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sample() -> Path:
    """The folder with teacher/, images/, texts/ and eval/."""
    return sample_dir()


@pytest.fixture(scope="session")
def sample_teacher(sample: Path) -> str:
    """What --teacher takes for the sample's teacher, for tests whose numbers matter."""
    return f"local-dir:{sample / 'teacher'}"


@pytest.fixture(scope="session")
def teacher_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What --teacher takes for a CLIP of random weights, 32 px and 128 wide, which takes hardly any time."""
    from tests.tiny_clip import write_clip

    return f"local-dir:{write_clip(tmp_path_factory.mktemp('teacher') / 'tiny', scale=3, width=128)}"


@pytest.fixture(scope="session")
def clip(teacher_name: str) -> Clip:
    """That teacher on the CPU."""
    from dimefm.models.clip import load_clip

    return load_clip(teacher_name, device="cpu")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk, of 64 KiB at first."""
    found = Disk(tmp_path / "disk")
    yield found
    found.unmount()


@pytest.fixture
def new_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without what it has compiled before, which may be for another kind of CPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture(scope="session")
def image_tar(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 96 images of the sample."""
    from tests.making import read_tar, write_tar

    members = read_tar(sample / "images" / "train-00000.tar", IMAGES)
    return write_tar(tmp_path_factory.mktemp("images") / "images-00000.tar", members)


@pytest.fixture(scope="session")
def text_file(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 different sentences of the sample, one a line."""
    lines = gzip.decompress((sample / "texts" / "visual_coco_val2017.txt.gz").read_bytes()).decode().splitlines()
    path = tmp_path_factory.mktemp("texts") / "sentences.txt"
    path.write_text("".join(f"{line}\n" for line in list(dict.fromkeys(lines))[:SENTENCES]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cifar10(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A labelled set: the first 200 images of eval/cifar10, with all its classes and prompts."""
    from tests.making import read_tar, write_tar

    source, folder = sample / "eval" / "cifar10", tmp_path_factory.mktemp("eval") / "cifar10"
    write_tar(folder / "test-00000.tar", read_tar(source / "test-00000.tar", 2 * 200))
    for name in ("classnames.txt", "templates.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    return str(folder)


def cached(kind: Any, source: Path, out: Path, clip: Clip, **changes: Any) -> Store:
    """A finished store over `source`, planned and encoded in this process; `changes` are those of its PlanRequest."""
    from dimefm.caching.encode_shard import encode_shard
    from dimefm.caching.plan import PlanRequest, open_or_plan

    words: dict[str, Any] = {"shard_rows": SHARD_ROWS, "batch_size": 16, **changes}
    request = PlanRequest(kind=kind, arguments=(str(source),), **words)
    store = open_or_plan(request, str(out), clip.identity)
    for shard in range(store.schema.shards):
        encode_shard(store, shard, clip)
    return store


@pytest.fixture(scope="session")
def image_store(image_tar: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The finished store of `image_tar`: 96 rows in 3 shards. Shared by all tests: not to be written to."""
    return cached("image", image_tar, tmp_path_factory.mktemp("stores") / "images.zarr", clip)


@pytest.fixture(scope="session")
def text_store(text_file: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The finished store of `text_file`: 200 rows in 7 shards. Shared by all tests: not to be written to."""
    return cached("text", text_file, tmp_path_factory.mktemp("stores") / "texts.zarr", clip)


@pytest.fixture(scope="session")
def prompt_store(cifar10: str, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The finished store of the prompts of `cifar10`. Shared by all tests: not to be written to."""
    return cached("text", Path(cifar10), tmp_path_factory.mktemp("stores") / "prompts.zarr", clip)


@pytest.fixture(scope="session")
def tiny_run(image_store: Store, text_store: Store) -> list[str]:
    """The words of a small `dimefm train-student`, all but --out: eight steps of 16 images at 32 px."""
    from tests.tiny_training import STUDENT

    stores = ["--images", image_store.path, "--texts", text_store.path]
    sizes = ["--image-size", "32", "--batch-size", "16", "--texts-per-step", "64", "--epochs", "2", "--max-steps", "8"]
    rest = ["--loss", "vl=0.7,pvl=0.3,centred=1", "--precision", "fp32", "--workers", "0", "--checkpoint-every", "2"]
    return ["train-student", *stores, "--recipe", "sample", "--student", STUDENT, *sizes, *rest]
