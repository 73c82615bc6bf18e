"""What stage 1 does for a GPU, as far as a CPU shows it: weights in half, overflow, overlap, cores, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas import Status
from cache_schemas.embedding_store import EMBEDDING, STATUS
from cache_schemas.plan import planned_rows
from dimefm.caching import encode_rows as rows_module
from dimefm.caching.canary import check_canary
from dimefm.caching.encode_rows import encode_rows
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.image_loader import Loaded, Loader
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.speed import Rates, measure
from dimefm.caching.worker import Job, Worker
from dimefm.errors import DimefmError, MismatchError, StoreError, TeacherError
from dimefm.models.clip import Clip, load_clip, teacher_precision
from dimefm.store.embedding_store import Store
from dimefm.system.transfer import Arriving
from pipeline import cache_job
from pipeline.cache import CacheConfig, cache
from tests.conftest import cached
from tests.making import make_jpeg, write_tar

HALVES = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


def cosines(one_ND: Any, other_ND: Any) -> torch.Tensor:
    one_ND, other_ND = (torch.as_tensor(values).float() for values in (one_ND, other_ND))
    return torch.nn.functional.cosine_similarity(one_ND, other_ND, dim=-1)


# -- weights are held in the precision of the products ----------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [HALVES[0], pytest.param(*HALVES[1], marks=pytest.mark.slow)])
def test_the_sample_teacher_in_half_is_near_itself_in_float32(
    sample_teacher: str, image_store: Store, precision: Any, dtype: torch.dtype
) -> None:
    half, whole = (load_clip(sample_teacher, precision=p, device="cpu") for p in (precision, "fp32"))
    assert half.weight_bytes() < 0.51 * whole.weight_bytes()
    assert half.identity.weights == whole.identity.weights
    norms = [m for m in half.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(m.running_var.dtype == torch.float32 for m in norms)
    loader = Loader(replace(image_store.schema, teacher=half.identity))
    loaded = [loader.load(row) for row in planned_rows(image_store.plan(0))[:8]]
    pixels = torch.cat([one.pixels_V3HW for one in loaded if isinstance(one, Loaded)])
    least = 0.999 if precision == "fp16" else 0.99
    assert cosines(half.encode_images(pixels), whole.encode_images(pixels)).min() > least
    texts = ["a photo of a cat", "two dogs on a long and winding road to the sea"]
    assert cosines(half.encode_texts(texts), whole.encode_texts(texts)).min() > 0.999


def test_a_teacher_computes_in_fp16_on_a_gpu_and_in_fp32_on_a_cpu() -> None:
    assert (teacher_precision("cuda"), teacher_precision("cuda:1"), teacher_precision("cpu")) == (
        "fp16",
        "fp16",
        "fp32",
    )


def overflowing(teacher_name: str, tower: str) -> Clip:
    """The tiny teacher in float16, with a hidden layer that holds numbers beyond it for some inputs and not others."""
    clip = load_clip(teacher_name, precision="fp16", device="cpu")
    model = clip.model.visual if tower == "image" else clip.model
    mlp = model.transformer.resblocks[0].mlp
    factor = {"image": 11900, "text": 14000}[tower]  # so that some rows go beyond 65504
    mlp.c_fc.weight.data *= factor
    mlp.c_proj.weight.data /= factor
    return clip


@pytest.mark.parametrize("kind", ["image", "text"])
def test_rows_that_overflow_float16_are_computed_again_in_float32(
    kind: str, image_store: Store, text_store: Store, teacher_name: str
) -> None:
    store = image_store if kind == "image" else text_store
    clip, rows = overflowing(teacher_name, kind), planned_rows(store.plan(0))
    schema = replace(store.schema, teacher=clip.identity)
    right = encode_rows(rows, schema, clip.in_float32()).arrays[EMBEDDING]
    # As bf16 says it is, nothing is computed again: these are the rows that overflow.
    alone = encode_rows(rows, replace(schema, teacher=replace(clip.identity, precision="bf16")), clip)
    lost = alone.arrays[STATUS] == Status.NOT_FINITE
    assert 0 < lost.sum() < len(rows)
    data = encode_rows(rows, schema, clip)
    assert (data.arrays[STATUS] == Status.OK).all()
    assert not data.reasons
    np.testing.assert_array_equal(data.arrays[EMBEDDING][lost], right[lost])
    np.testing.assert_array_equal(data.arrays[EMBEDDING][~lost], alone.arrays[EMBEDDING][~lost])


def test_what_is_not_finite_in_float32_either_has_its_status(image_store: Store, teacher_name: str) -> None:
    clip = load_clip(teacher_name, precision="fp16", device="cpu")
    clip.model.visual.proj.data[0, 0] = float("nan")
    schema = replace(image_store.schema, teacher=clip.identity)
    data = encode_rows(planned_rows(image_store.plan(0)), schema, clip)
    assert (data.arrays[STATUS] == Status.NOT_FINITE).all()
    assert (data.arrays[EMBEDDING] == 0).all()


# -- the device works while results are fetched -----------------------------------------------------------------------


def test_results_are_waited_for_once_the_next_batch_was_sent_and_pixels_stay_until_then(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch of which no image can be read, and one of which some can, are among them.
    bad = {4, 5, 6, 7, 9, 17}
    files = {f"{i:02d}.jpg": b"no image" if i in bad else make_jpeg((60, 50), seed=i) for i in range(26)}
    tar = write_tar(tmp_path / "a.tar", files)
    store = cached("image", tar, tmp_path / "s.zarr", clip, batch_size=4)
    events: list[str] = []

    class Spy:
        identity, device = clip.identity, clip.device

        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            self.sent, self.copy = pixels, pixels.clone()
            return clip.encode_images(pixels)

    spy: Any = Spy()

    def fetch(*tensors: torch.Tensor) -> Arriving:
        number, sent, copied = sum(e.startswith("sent") for e in events), spy.sent, spy.copy
        events.append(f"sent {number}")

        class Waited(Arriving):
            def wait(self) -> tuple[torch.Tensor, ...]:
                events.append(f"waited {number}")
                assert torch.equal(sent, copied)
                return super().wait()

        return Waited(tensors, None)

    monkeypatch.setattr(rows_module, "fetch", fetch)
    data = encode_rows(planned_rows(store.plan(0)), store.schema, spy, threads=3)
    expected = ["sent 0"]
    # The second batch is empty: the first is waited for as it passes.
    expected += ["waited 0", "sent 1", "sent 2", "waited 1", "sent 3", "waited 2", "sent 4", "waited 3"]
    expected += ["sent 5", "waited 4", "waited 5"]
    assert events == expected
    np.testing.assert_array_equal(data.arrays[EMBEDDING], store.read(0, 26))
    assert np.flatnonzero(data.arrays[STATUS] != Status.OK).tolist() == sorted(bad)


def test_every_thread_count_and_batch_gives_each_image_its_own_pixels(image_store: Store) -> None:
    rows, loader = planned_rows(image_store.plan(0)), Loader(image_store.schema)
    alone = [loader.load(row) for row in rows]
    for size, threads in ((1, 1), (5, 3), (32, 2), (100, 4)):
        places = 0
        for loaded, pixels in loader.batches(rows, size, threads):
            for one, mine in zip(loaded, pixels, strict=True):
                whole = alone[places]
                assert isinstance(one, Loaded)
                assert isinstance(whole, Loaded)
                assert torch.equal(mine, whole.pixels_V3HW[0])
                places += 1
        assert places == len(rows)
    assert list(loader.batches([], 4, 1)) == []


# -- cores, batches and memory ----------------------------------------------------------------------------------------


def test_a_gpu_that_decoding_cannot_feed_is_said_with_the_cores_it_needs() -> None:
    rates = Rates(load=500, teacher=4000)
    assert (rates.threads_wanted(), rates.threads(16), rates.threads(4)) == (10, 10, 4)
    assert rates.bottleneck(10) is None
    said = rates.bottleneck(4)
    assert said
    assert "4 threads decode about 2,000 of the 4,000 images/s" in said
    assert "10 cores" in said


def test_a_compiled_teacher_is_measured_over_whole_batches(image_store: Store, teacher_name: str) -> None:
    class Spy(Clip):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            sizes.append(len(pixels))
            return super().encode_images(pixels)

    loaded, sizes = load_clip(teacher_name, device="cpu"), list[int]()
    clip = Spy(loaded.model, loaded.tokenizer, loaded.identity, loaded.model_cfg, "cpu")
    rows, schema = planned_rows(image_store.plan(0)), replace(image_store.schema, batch_size=50)
    measure(rows, schema, clip)
    clip._compiled_batch = 50
    measure(rows, schema, clip)
    assert sizes == [32, 32, 50, 50]


def test_a_full_gpu_is_named_with_the_batch_that_would_fit(
    image_store: Store, teacher_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    job = Job(
        store=image_store.path, teacher=teacher_name, pretrained=None, precision="fp32", device="cpu", threads=None
    )
    worker = Worker(job)
    worker.start(1, 0)
    monkeypatch.setattr("dimefm.caching.worker.encode_shard", full)
    with pytest.raises(TeacherError, match=r"does not hold batches of 16 images") as caught:
        worker.encode(0)
    assert "--batch-size 8" in str(caught.value)
    monkeypatch.setattr("dimefm.caching.worker.measure", full)
    with pytest.raises(DimefmError, match="does not hold batches"):
        Worker(job).start(2, 0)


def test_a_store_that_is_gone_on_with_on_another_kind_of_device_keeps_its_batches(
    image_tar: Path, teacher_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"kind": "image", "sources": (str(image_tar),), "teacher": teacher_name, "device": "cpu"}
    config = CacheConfig(**words, out=str(tmp_path / "s.zarr"), shard_rows=32)
    began = cache(config)
    (tmp_path / "s.zarr" / "commits" / "000001.json").unlink()
    monkeypatch.setitem(cache_job.BATCH_SIZE, "cpu", 512)
    assert cache(config).schema == began.schema


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"device": "cpu"}, "--decoder nvjpeg decodes on a GPU, and this is a CPU"),
        ({"device": "cuda", "views": 2}, "goes with neither --views nor --pixels"),
        ({"device": "cuda", "pixels": 64}, "goes with neither --views nor --pixels"),
    ],
)
def test_what_nvjpeg_cannot_do_is_refused_before_anything_is_written(
    more: dict[str, Any], said: str, image_tar: Path, teacher_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimefm.system.machine.choose_device", lambda asked: asked)
    monkeypatch.setattr("pipeline.cache_job.choose_device", lambda asked: asked)
    out = tmp_path / "s.zarr"
    words: dict[str, Any] = {"kind": "image", "sources": (str(image_tar),), "teacher": teacher_name, "out": str(out)}
    with pytest.raises(DimefmError, match=said):
        cache(CacheConfig(**words, decoder="nvjpeg", **more))
    assert not out.exists()


def test_a_store_decoded_by_nvjpeg_is_not_gone_on_with_by_another_decoder(
    image_store: Store, image_tar: Path, clip: Clip
) -> None:
    rows, schema = planned_rows(image_store.plan(0)), replace(image_store.schema, decoder="nvjpeg")
    with pytest.raises(StoreError, match=r"decoded by nvJPEG, on a GPU(?s:.*)--decoder fast"):
        encode_rows(rows, schema, clip)
    request = PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=32, batch_size=16, decoder="nvjpeg")
    with pytest.raises(MismatchError, match="decoder: fast != nvjpeg"):
        open_or_plan(request, image_store.path, clip.identity)


def test_pillow_decodes_to_open_clips_own_pixels(image_tar: Path, teacher_name: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"kind": "image", "sources": (str(image_tar),), "teacher": teacher_name, "device": "cpu"}
    stores = [cache(CacheConfig(**words, out=str(tmp_path / d), decoder=d)) for d in ("fast", "pillow")]  # type: ignore[arg-type]
    fast, pillow = (store.read(0, 96) for store in stores)
    assert stores[1].schema.decoder == "pillow"
    assert not np.array_equal(fast, pillow)
    assert cosines(fast, pillow).min() > 0.999


# -- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpu_gives_what_the_cpu_gives_and_the_same_bytes_again(
    kind: str, precision: Any, image_store: Store, text_store: Store, teacher_name: str, tmp_path: Path
) -> None:
    store = image_store if kind == "image" else text_store
    clip = load_clip(teacher_name, precision=precision, device="cuda")
    schema = replace(store.schema, teacher=clip.identity)
    rows = [row for shard in range(store.schema.shards) for row in planned_rows(store.plan(shard))]
    found = [encode_rows(rows, schema, clip, threads=4).arrays for _ in range(2)]
    np.testing.assert_array_equal(found[0][EMBEDDING], found[1][EMBEDDING])
    least = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}[precision]
    assert cosines(found[0][EMBEDDING], store.read(0, len(rows))).min() > least


@pytest.mark.gpu
@needs_gpu
def test_a_compiled_teacher_on_a_gpu_agrees_batch_after_batch(image_store: Store, teacher_name: str) -> None:
    eager, compiled = (load_clip(teacher_name, device="cuda") for _ in range(2))
    compiled.compile(image_store.schema.batch_size)
    rows = [row for shard in range(3) for row in planned_rows(image_store.plan(shard))][:90]
    schema = replace(image_store.schema, teacher=eager.identity)
    found = [encode_rows(rows, schema, clip, threads=4).arrays[EMBEDDING] for clip in (eager, compiled)]
    assert cosines(*found).min() > 0.9999


@pytest.mark.gpu
@needs_gpu
def test_rows_that_overflow_on_a_gpu_are_computed_again(image_store: Store, teacher_name: str) -> None:
    clip = overflowing(teacher_name, "image").on("cuda")
    rows, schema = planned_rows(image_store.plan(0)), replace(image_store.schema, teacher=clip.identity)
    data = encode_rows(rows, schema, clip)
    assert (data.arrays[STATUS] == Status.OK).all()


@pytest.mark.gpu
@needs_gpu
def test_a_shard_on_a_gpu_is_committed_and_passes_the_canary(
    image_tar: Path, teacher_name: str, tmp_path: Path
) -> None:
    clip = load_clip(teacher_name, device="cuda")
    store = cached("image", image_tar, tmp_path / "s.zarr", clip)
    check_canary(store, clip)
    commit = encode_shard(store, 0, clip, threads=2)
    assert commit.device == "cuda"


@pytest.mark.gpu
@needs_gpu
def test_images_decoded_on_a_gpu_are_near_and_rows_that_fail_keep_their_reasons(
    teacher_name: str, tmp_path: Path
) -> None:
    files = {f"{i:02d}.jpg": make_jpeg((400, 300), seed=i) for i in range(21)}
    files |= {"05.jpg": b"no image", "11.jpg": b"", "13.jpg": files["13.jpg"][:2000]}
    tar = write_tar(tmp_path / "a.tar", files)
    clip = load_clip(teacher_name, device="cuda")
    stores = [cached("image", tar, tmp_path / f"{d}.zarr", clip, batch_size=4, decoder=d) for d in ("fast", "nvjpeg")]
    fast, nvjpeg = (store.read(0, 21) for store in stores)
    assert stores[0].status().tolist() == stores[1].status().tolist()
    good = stores[0].status() == Status.OK
    assert good.sum() == 18
    assert cosines(fast[good], nvjpeg[good]).min() > 0.98
