"""The order of rows, the augmentation, the text batches and the schedule: pure functions of seed and position."""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.optim import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torchvision.transforms import RandomResizedCrop

from cache_schemas import Status
from dimefm.errors import TrainingError
from dimefm.images.decode import decode_rgb, decode_scaled, jpeg_size
from dimefm.models.towers import build_student, build_text_student, student_spec, text_spec
from dimefm.system.transfer import Transfer
from dimefm.training import image_batches as data_module
from dimefm.training import row_order, text_bank
from dimefm.training.config import TextMix
from dimefm.training.image_batches import Augmentation, random_crop
from dimefm.training.optimizer import learning_rate, parameter_groups
from dimefm.training.recipes import paper
from dimefm.training.row_order import Order
from dimefm.training.text_bank import TextBank
from tests.making import encoded, make_jpeg, picture
from tests.stores import random_store, teacher_identity

CPU = torch.device("cpu")


def _epoch(order: Order, epoch: int = 0, skip: int = 0) -> list[np.ndarray]:
    """The batches of an epoch from `skip` on."""
    steps = order.steps_per_epoch
    return [rows for _, _, rows in order.steps(epoch * steps + skip, (epoch + 1) * steps)]


@pytest.fixture(params=["blocks", "chunks"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both orders, their windows small."""
    monkeypatch.setattr(row_order, "CHUNKS_WINDOW_ROWS", 32)
    monkeypatch.setattr(row_order, "WINDOW_ROWS", 32)
    monkeypatch.setattr(row_order, "WINDOW_BATCHES", 2)
    return request.param


def test_every_row_with_an_embedding_comes_once_an_epoch(tmp_path: Path, kind: Any) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=200, shard_rows=32, failed=(0, 50, 51, 199))
    mine = Order(store=store, seed=0, batch_size=7, kind=kind)
    batches = _epoch(mine)
    assert len(batches) == mine.steps_per_epoch == 28
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == 196
    assert not {0, 50, 51, 199} & set(rows.tolist())
    assert np.abs(np.diff(rows)).mean() > 3, "rows come in the order of the store"


def test_an_incomplete_batch_leaves_out_other_rows_each_epoch(tmp_path: Path, kind: Any) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=100, shard_rows=32)
    mine = Order(store=store, seed=0, batch_size=30, kind=kind)
    left = [set(range(100)) - set(np.concatenate(_epoch(mine, epoch)).tolist()) for epoch in range(3)]
    assert [len(rows) for rows in left] == [10] * 3
    assert len(left[0] | left[1] | left[2]) > 15


@pytest.mark.parametrize("skip", [0, 1, 7, 11])
def test_skipping_gives_the_rest_of_the_same_order(tmp_path: Path, skip: int, kind: Any) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=100, shard_rows=32, failed=(1, 2, 3))
    mine = Order(store=store, seed=3, batch_size=8, kind=kind)
    whole = _epoch(mine, 2)
    np.testing.assert_array_equal(whole[skip:], _epoch(mine, 2, skip))
    first, stop = 24 + skip, 24 + skip + 9  # into the next epoch
    windows = list(mine.windows(first, stop))
    assert [(at, at // 12) for at, _, _ in windows] == [(at, epoch) for at, epoch, _ in windows]
    rows_SG = np.concatenate([rows for _, _, rows in windows])
    np.testing.assert_array_equal(rows_SG, [rows for _, _, rows in mine.steps(first, stop)])
    assert len(rows_SG) == 9


def test_no_window_is_made_that_has_none_of_the_steps(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those after them, nor, in blocks, those before."""
    store, _ = random_store(tmp_path / "s.zarr", rows=320, shard_rows=32)
    mine, made = Order(store=store, seed=0, batch_size=16, kind=kind), list[int]()
    monkeypatch.setattr(Order, "_rows", lambda self, number_N: made.append(1) or number_N)
    monkeypatch.setattr(Order, "_chunk", lambda self, start, size: made.append(1) or np.arange(start, start + size))
    assert len(list(mine.steps(0, 1))) == 1
    assert len(made) == (2 if kind == "chunks" else 1)
    made.clear()
    assert len(list(mine.steps(19, 20))) == 1
    assert len(made) == (20 if kind == "chunks" else 1)


def test_epochs_seeds_and_streams_differ(tmp_path: Path, kind: Any) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=64, shard_rows=32)
    orders = {
        tuple(np.concatenate(_epoch(Order(store=store, seed=s, batch_size=64, stream=stream, kind=kind), e)))
        for s in (0, 1)
        for e in (0, 1)
        for stream in (0, 1)
    }
    assert len(orders) == 8


def test_older_runs_keep_their_order_to_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of steps 7 to 59 as the code gave them before there was another order."""
    monkeypatch.setattr(row_order, "CHUNKS_WINDOW_ROWS", 128)
    store, _ = random_store(tmp_path / "s.zarr", rows=500, shard_rows=64, failed=(3, 100, 101, 499))
    some = np.arange(0, 500, 3, dtype=np.int32)
    whole = Order(store=store, seed=5, batch_size=24, kind="chunks")
    part = Order(store=store, seed=5, batch_size=24, only=some, stream=1, kind="chunks")
    assert (whole.steps_per_epoch, _digest(whole)) == (20, "b46854f0ee3c2471")
    assert (part.steps_per_epoch, _digest(part)) == (6, "c1525a95834ce0cc")


def _digest(order: Order) -> str:
    digest = hashlib.sha256()
    for step, epoch, rows in order.steps(7, 60):
        digest.update(np.array([step, epoch, *rows.tolist()], "<i8").tobytes())
    return digest.hexdigest()[:16]


def test_rows_without_an_embedding_are_left_out_as_if_they_were_not_selected(tmp_path: Path) -> None:
    """So that what is shown of a selection below holds for a whole store."""
    failed = tuple(np.random.default_rng(0).choice(300, 60, replace=False).tolist())
    store, _ = random_store(tmp_path / "s.zarr", rows=300, shard_rows=32, failed=failed)
    good = np.flatnonzero(store.status() == Status.OK).astype(np.int32)
    mine, selected = (Order(store=store, seed=1, batch_size=16, only=only) for only in (None, good))
    np.testing.assert_array_equal(_epoch(mine), _epoch(selected))


@pytest.mark.parametrize("every", [1, 3], ids=["all rows", "a selection"])
def test_batches_of_a_sorted_source_are_mixed_as_if_drawn_at_random(tmp_path: Path, every: int) -> None:
    """Four million rows that count, 650 a class one after another, in batches of 5,120."""
    rows, per_class, size = 4_000_000, 650, 5120
    store, _ = random_store(tmp_path / "s.zarr", rows=32, shard_rows=32)
    only = np.arange(0, rows * every, every, dtype=np.int32)
    mine = Order(store=store, seed=0, batch_size=size, only=only)
    rng = np.random.default_rng(0)
    found, drawn = [], []
    for first in (0, 300, mine.steps_per_epoch - 4):
        found.append([set((rows_G // every // per_class).tolist()) for _, _, rows_G in mine.steps(first, first + 4)])
        drawn.append([set((rng.integers(rows, size=size) // per_class).tolist()) for _ in range(4)])
    classes, shared = _mixed(found)
    expected, expected_shared = _mixed(drawn)
    assert classes > 0.97 * expected
    assert shared < 1.08 * expected_shared


def _mixed(batches: list[list[set[int]]]) -> tuple[float, float]:
    """The mean number of classes of a batch, and the mean share of them that are in the next one too."""
    shared = [len(a & b) / len(a) for run in batches for a, b in pairwise(run)]
    return float(np.mean([len(batch) for run in batches for batch in run])), float(np.mean(shared))


def test_augmentation_depends_on_seed_epoch_and_row_alone() -> None:
    image = make_jpeg((60, 40))
    augment = Augmentation(size=32, crop_scale=(0.08, 1.0), flip=True, seed=0)
    assert torch.equal(augment(image, 1, 5), augment(image, 1, 5))
    assert augment(image, 1, 5).shape == (3, 32, 32)
    for other in (
        augment(image, 2, 5),
        augment(image, 1, 6),
        Augmentation(size=32, crop_scale=(0.08, 1), flip=True, seed=1)(image, 1, 5),
    ):
        assert not torch.equal(augment(image, 1, 5), other)


def test_half_of_the_views_are_flipped_and_none_without_flip() -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (64, 64, 3))  # brighter to the right
    image = encoded(Image.fromarray(ramp), "PNG")
    views = {
        flip: [Augmentation(size=16, crop_scale=(0.9, 1), flip=flip, seed=0)(image, 0, r) for r in range(200)]
        for flip in (True, False)
    }
    flipped = {flip: sum(bool(v[0, 0, 0] > v[0, 0, -1]) for v in found) for flip, found in views.items()}
    assert flipped[False] == 0
    assert 70 < flipped[True] < 130


@pytest.mark.parametrize("size", [16, 64, 200])
def test_a_jpeg_decoded_small_gives_nearly_the_same_view(size: int) -> None:
    """Against the same crop of the whole image."""
    data = encoded(picture((16, 12)).resize((400, 300), Image.Resampling.BICUBIC), "JPEG")  # smooth
    augment = Augmentation(size=size, crop_scale=(0.3, 1.0), flip=True, seed=0)
    whole = decode_rgb(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "decode_scaled", lambda data, size, scale: whole)
        expected = torch.stack([augment(data, 0, row) for row in range(8)]).float()
    views = torch.stack([augment(data, 0, row) for row in range(8)]).float()
    assert (views - expected).abs().mean() < 5
    for scale, height in ((1.0, 300), (size / 300, {16: 38, 64: 75, 200: 225}[size])):
        assert decode_scaled(data, (300, 400), scale).shape[-2] == height  # an eighth, a quarter, three quarters


def test_jpegs_that_the_strict_decoder_refuses_are_read_as_stage_1_reads_them() -> None:
    whole = make_jpeg((80, 60))
    assert jpeg_size(whole) == (60, 80)
    assert jpeg_size(encoded(picture((8, 8)), "PNG")) is None
    noisy = whole[:-2] + bytes(20) + whole[-2:]  # bytes between the data and its end mark
    assert torch.equal(decode_scaled(noisy, (60, 80), 1.0), decode_rgb(noisy))


def test_crops_are_distributed_as_torchvisions() -> None:
    """Mean area and aspect ratio of 4,000 crops, against torchvision's own parameters."""
    torch.manual_seed(0)
    image, rng = torch.zeros(3, 90, 120), np.random.default_rng(0)
    mine = np.array([random_crop(90, 120, (0.08, 1.0), rng) for _ in range(4000)], float)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], float)
    for value in (
        lambda c: c[:, 2] * c[:, 3] / 10800,
        lambda c: np.log(c[:, 3] / c[:, 2]),
        lambda c: c[:, 0],
        lambda c: c[:, 1],
    ):
        assert value(mine).mean() == pytest.approx(value(theirs).mean(), abs=4 * value(theirs).std() / 4000**0.5 * 1.5)
    assert (mine[:, 0] + mine[:, 2] <= 90).all()
    assert (mine[:, 1] + mine[:, 3] <= 120).all()


def test_a_crop_of_an_extreme_image_is_its_centre() -> None:
    top, left, height, width = random_crop(10, 1000, (0.99, 1.0), np.random.default_rng(0))
    assert (top, height, width) == (0, 10, 13)
    assert left == (1000 - 13) // 2


@pytest.mark.parametrize("place", ["disk", "memory", "device"])
def test_text_batches_follow_their_mix(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_bank, "_room_in_memory", lambda: 2**40 * (place == "memory"))
    monkeypatch.setattr(text_bank, "_room_on", lambda device: 2**40 * (place == "device"))
    monkeypatch.setattr(text_bank, "_BLOCK", 30)
    texts, values = random_store(tmp_path / "t.zarr", rows=100, shard_rows=32, kind="text", failed=(4,))
    bank = TextBank(texts, TextMix(random=0.25, selected=0.5, retrieved=0.25), _Pairs(), seed=0, total=400,
                    paired=True, device=CPU)  # type: ignore[arg-type]  # fmt: skip
    assert bank.kept_in == place
    assert bank.bytes_of_step(2) == (0 if place == "device" else 402 * 16 * 2)
    rows = bank.rows(3, np.array([0, 1]))
    assert len(rows) == 400
    selected, retrieved = rows[100:300], rows[300:]
    assert set(selected.tolist()) == {10, 20, 30}
    assert set(retrieved.tolist()) == {7, 8}
    assert 4 not in rows[:100]
    assert len(set(rows[:100].tolist())) > 40
    drawn, send = bank.draw(3, np.array([0, 1])), Transfer(CPU).send
    bank.upload(CPU)
    np.testing.assert_array_equal(bank.embeddings(drawn, send).numpy(), values[rows].astype(np.float32))
    np.testing.assert_array_equal(rows, bank.rows(3, np.array([0, 1])))
    assert not np.array_equal(rows[:100], bank.rows(4, np.array([0, 1]))[:100])
    pair = bank.pair(drawn, send)
    assert pair is not None
    assert pair[1].tolist() == [7, 7]
    np.testing.assert_array_equal(pair[0].numpy(), values[[7, 7]].astype(np.float32))


class _Pairs:
    """Every image retrieved sentences 7 and 8 (and nothing more); 10, 20 and 30 are selected."""

    def hits(self) -> np.ndarray:
        hits = np.zeros(100, np.uint32)
        hits[[10, 20, 30]] = 1
        return hits

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.array([[7, 8, -1]] * len(rows), np.int32)


def test_texts_from_where_there_are_none(tmp_path: Path) -> None:
    texts, _ = random_store(tmp_path / "t.zarr", rows=100, shard_rows=32, kind="text")

    class Nothing(_Pairs):
        def hits(self) -> np.ndarray:
            return np.zeros(100, np.uint32)

        def gather(self, rows: np.ndarray) -> np.ndarray:
            return np.full((len(rows), 3), -1, np.int32)

    bank = TextBank(texts, TextMix(random=0.5, retrieved=0.5), Nothing(), seed=0, total=8)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="step 4: no sentence was retrieved for any image of the batch"):
        bank.draw(3, np.array([0, 1]))
    with pytest.raises(TrainingError, match="no sentence is selected"):
        TextBank(texts, TextMix(random=0, selected=1), Nothing(), seed=0, total=8)  # type: ignore[arg-type]
    own = TextBank(texts, TextMix(), _Pairs(), seed=0, total=0, paired=True)  # type: ignore[arg-type]
    drawn = own.draw(0, np.array([0, 1]))
    assert len(drawn.rows_T) == 0, "texts are read that no loss looks at"


def test_a_mix_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    texts, _ = random_store(tmp_path / "t.zarr", rows=32, shard_rows=32, kind="text")
    with pytest.raises(TrainingError, match="selected texts need --selection or --pairs"):
        TextBank(texts, TextMix(random=0.5, selected=0.5), None, seed=0, total=8)
    with pytest.raises(TrainingError, match="retrieved texts need --pairs"):
        TextBank(texts, TextMix(random=0.5, retrieved=0.5), None, seed=0, total=8)
    with pytest.raises(TrainingError, match="contrastive loss needs --captions or --pairs"):
        TextBank(texts, TextMix(), None, seed=0, total=8, paired=True)


def test_schedule_warms_up_and_falls_to_the_floor() -> None:
    values = [
        learning_rate(s, steps=100, warmup_steps=10, peak=8e-4, warmup_start=4e-6, floor=4e-5) for s in range(101)
    ]
    assert values[0] == 4e-6
    assert values[10] == pytest.approx(8e-4)
    assert values[55] == pytest.approx((8e-4 + 4e-5) / 2)
    assert values[100] == pytest.approx(4e-5)
    assert max(values) == values[10]
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)


def test_the_paper_s_recipe_has_the_released_numbers() -> None:
    """Those of Training/utils/opts.py and optim.py of the authors' repository; the batch is that of eight GPUs."""
    config = paper("IMAGES", "TEXTS", "RUN")
    expected = {
        "lr": 8e-4, "min_lr": 4e-5, "warmup_lr": 4e-6, "warmup_epochs": 4, "epochs": 100, "eps": 1e-8,
        "betas": (0.9, 0.999), "weight_decay": 0.05, "clip_grad": None, "crop_scale": (0.08, 1.0), "ema": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.student, config.batch_size, config.texts_per_step) == ("ViT-B-32", 8 * 640, 8 * 640)
    loss = config.loss
    assert (loss.vl, loss.pvl, loss.udist) == (0.7, 0.3, 0)
    assert (loss.vl_temperature, loss.pvl_temperature, loss.udist_temperature) == (1, 3, 7)


def test_the_schedule_differs_from_the_released_one_by_as_much_as_its_recipe_says() -> None:
    steps, warmup = 10_000, 400
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=8e-4)
    released = CosineLRScheduler(optimizer, t_initial=steps, lr_min=4e-5, warmup_lr_init=4e-6, warmup_t=warmup,
                                 cycle_limit=1, t_in_epochs=False)  # fmt: skip
    higher = []
    for step in range(steps):
        released.step_update(step)
        mine = learning_rate(step, steps=steps, warmup_steps=warmup, peak=8e-4, warmup_start=4e-6, floor=4e-5)
        higher.append(mine - optimizer.param_groups[0]["lr"])
    assert higher[:warmup] == pytest.approx([0] * warmup, abs=1e-12)
    assert min(higher) > -1e-12
    assert 2.75e-5 < max(higher) < 2.85e-5


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("ViT-B-32", {"positional_embedding"}),
        ("resnet10t", set()),
        ("vit_tiny_patch16_224", {"trunk.cls_token", "trunk.pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
        ("levit_128s", {"attention_biases"}),
    ],
)
def test_what_a_tower_lists_is_not_decayed(name: str, matrices: set[str]) -> None:
    """Of more than one dimension, `matrices` are all that is not decayed, by the whole name or its end."""
    model = build_student(student_spec(name, teacher_identity()))
    _require_undecayed(model, matrices)
    trunk = getattr(model, "trunk", None)
    if trunk is not None and hasattr(trunk, "no_weight_decay"):  # and as timm's own function groups them
        theirs = param_groups_weight_decay(trunk, 0.05, no_weight_decay_list=trunk.no_weight_decay())
        kept = {id(p) for group in theirs if not group["weight_decay"] for p in group["params"]}
        assert kept == {id(p) for p in parameter_groups([trunk], 0.05)[1]["params"]}


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32"])
def test_embeddings_of_tokens_and_positions_are_not_decayed(name: str) -> None:
    model = build_text_student(text_spec(name, teacher_identity()))
    _require_undecayed(model, {"token_embedding.weight", "positional_embedding"})


def _require_undecayed(model: Any, matrices: set[str]) -> None:
    decayed, kept = parameter_groups([model], 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert all(p.ndim > 1 for p in decayed["params"])
    found = {names[id(p)] for p in kept["params"] if p.ndim > 1}
    assert {end for end in matrices if any(name.endswith(end) for name in found)} == matrices
    assert all(name.endswith(tuple(matrices)) for name in found)


def test_older_runs_keep_their_groups() -> None:
    """Their optimiser's state has them: of a timm tower the positional embeddings alone, beside vectors."""
    model = build_student(student_spec("test_vit", teacher_identity()))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = parameter_groups([model], 0.05, "named")
    assert {names[id(p)] for p in kept["params"] if p.ndim > 1} == {"trunk.pos_embed"}
    assert "trunk.cls_token" in {names[id(p)] for p in decayed["params"]}
