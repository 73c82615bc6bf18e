"""What runs on a GPU, run without one: fake tensors have a device and a shape, and no values.

Torch refuses to mix their devices, and to hand out a value, which on a GPU would wait for all that it has to do. A mode
of our own refuses the rest. Backward passes and autocast cannot be run so.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dimefm.images.preprocess import normalise
from dimefm.models.clip import Clip, load_clip
from dimefm.models.towers import build_student, build_text_student, has_convolutions, student_spec, text_spec
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.store.embedding_store import Store
from dimefm.system.transfer import Transfer
from dimefm.training.config import LossConfig, TextMix
from dimefm.training.objective import LOSSES, LossInputs, Objective
from dimefm.training.text_bank import TextBank
from tests.stores import teacher_identity
from tests.tiny_training import STUDENT

IMAGES, TEXTS, WIDTH = 8, 12, 16
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MIXED = r"same device|different devices"  # as torch 2.14 says it, and 2.11


class _Strict(TorchDispatchMode):
    """Refuses what torch allows: to index a tensor by one elsewhere, and, unless `waiting`, copies between memory and a
    GPU that the host waits for."""

    def __init__(self, waiting: bool) -> None:
        super().__init__()
        self._waiting = waiting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, aten = kwargs or {}, torch.ops.aten
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if func in (aten._to_copy.default, aten.copy_.default):
            ends = {value.device.type for value in tensors} | {torch.device(kwargs.get("device") or "meta").type}
            ahead = kwargs.get("non_blocking") or args[2:] == (True,)
            if ends >= {"cpu", "cuda"} and not ahead and not self._waiting:
                raise AssertionError(f"{func}: a copy that is waited for")
        elif len({value.device.type for value in tensors if value.ndim}) > 1:
            raise RuntimeError(f"{func}: different devices")
        return func(*args, **kwargs)


def _replace(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Module._apply, which cannot put tensors with values and those without into each other."""
    for part in module.modules() if recurse else [module]:
        for name, value in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(function(value.detach()), requires_grad=value.requires_grad)
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = function(value)
    return module


@contextmanager
def fake_cuda(*, waiting: bool = False) -> Iterator[None]:
    """Within the block, "cuda" means fake tensors. With `waiting`, copies may be waited for."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    event = SimpleNamespace(record=lambda _: None, synchronize=lambda: None)
    patches = {
        torch.nn.Module: {"_apply": _replace},
        torch.Tensor: {"pin_memory": lambda tensor: tensor, "record_stream": lambda *_: None},
        torch.cuda: {
            "Event": lambda: event,
            "Stream": lambda *_: stream,
            "current_stream": lambda *_: stream,
            "stream": lambda _: nullcontext(),
            "mem_get_info": lambda *_: (2**36, 2**36),
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in patches.items():
            for name, value in names.items():
                patch.setattr(owner, name, value)
        with FakeTensorMode(allow_non_fake_inputs=True), _Strict(waiting):
            yield


def units(rows: int, device: torch.device = CUDA, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(rows, WIDTH, device=device, requires_grad=requires_grad)


def loss_of(name: str, device: torch.device, *, masked: bool, queued: bool, learned: bool) -> torch.Tensor:
    """The loss, whose student is on a GPU and whose other inputs are on `device`."""
    scale: Any = torch.full((), 20.0, device=device, requires_grad=True) if learned else 20.0
    inputs = LossInputs(
        config=LossConfig(vl_temperature=3.0, pvl_temperature=3.0, udist_temperature=3.0, mask_diagonal=masked),
        teacher_GD=units(IMAGES, device),
        student_BD=units(IMAGES, requires_grad=True),
        text_TD=units(TEXTS, device),
        pair=(units(IMAGES, device), torch.arange(IMAGES, device=device)),
        mean_D=units(1, device)[0],
        student_scale=scale,
        queue=(units(5, device), units(5, device)) if queued else None,
    )
    return LOSSES[name](inputs)


@pytest.mark.parametrize("switches", [{}, {"masked": True, "queued": True, "learned": True}], ids=["plain", "all"])
@pytest.mark.parametrize("name", LossConfig.WEIGHTS)
def test_a_loss_stays_on_the_gpu(name: str, switches: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimefm.training.losses.CUDA_CHUNK_LOGITS", 40)
    words = {"masked": False, "queued": False, "learned": False, **switches}
    with fake_cuda():
        value = loss_of(name, CUDA, **words)
        assert value.device.type == "cuda"
        assert value.shape == ()
        assert value.requires_grad
        with pytest.raises(RuntimeError, match=MIXED):
            loss_of(name, CPU, **words)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queue", [0, 5, 20])
@pytest.mark.parametrize("logit_scale", ["fixed", "teacher", "learned"])
def test_the_objective_stays_on_the_gpu(logit_scale: Any, queue: int, masked: bool, square: bool) -> None:
    config = LossConfig(
        **dict.fromkeys(LossConfig.WEIGHTS, 1.0),
        logit_scale=logit_scale, queue=queue, mask_diagonal=masked, square_temperature=square,
    )  # fmt: skip
    with fake_cuda(waiting=True):
        objective = Objective(config, teacher_scale=50.0, dim=WIDTH, mean_D=torch.zeros(WIDTH)).to(CUDA)
    with fake_cuda():
        for _ in range(3):
            teacher, student = units(IMAGES), units(IMAGES, requires_grad=True)
            pair = units(IMAGES), torch.arange(IMAGES, device=CUDA)
            loss, parts = objective(teacher, student, units(TEXTS), pair)
            assert {value.device.type for value in (loss, *parts.values())} == {"cuda"}
            objective.after_step(teacher, student.detach())


def _bank(store: Store, where: str, monkeypatch: pytest.MonkeyPatch) -> TextBank:
    """With the store's embeddings on the GPU, in memory or on disk."""
    monkeypatch.setattr("dimefm.training.text_bank._room_in_memory", lambda: 2**40 if where == "memory" else 0)
    monkeypatch.setattr("dimefm.training.text_bank._room_on", lambda device: 2**40 if where == "device" else 0)
    pairs: Any = SimpleNamespace(gather=lambda rows_G: rows_G[:, None] - 2, path="")  # the first two have none
    bank = TextBank(store, TextMix(), pairs, seed=0, total=TEXTS, paired=True, device=CUDA)
    assert bank.kept_in == where
    return bank


@pytest.mark.parametrize("where", ["device", "memory", "disk"])
def test_the_text_bank_hands_out_what_is_on_the_gpu(
    where: str, text_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = _bank(text_store, where, monkeypatch)
    drawn = bank.draw(3, np.arange(IMAGES))
    with fake_cuda(waiting=True):
        bank.upload(CUDA)
    with fake_cuda():
        send = Transfer(CUDA).send
        text_TD, pair = bank.embeddings(drawn, send), bank.pair(drawn, send)
        assert pair is not None
        assert [value.device.type for value in (text_TD, *pair)] == ["cuda"] * 3
        assert (text_TD.shape, pair[0].shape, pair[1].shape) == ((TEXTS, 128), (IMAGES, 128), (IMAGES,))
        assert text_TD.dtype == pair[0].dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "padded"])
def test_a_teacher_encodes_on_the_gpu(
    teacher_name: str, precision: Any, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clip, "_ignores_padding", cut)  # these two look at values: once, and in memory
    monkeypatch.setattr("dimefm.models.clip.token_counts", lambda tokens_BL: np.array([3, 4]))
    clip = load_clip(teacher_name, device="cpu", precision=precision)
    pixels, tokens = (
        torch.zeros(3, 3, *clip.identity.preprocessing.size, dtype=torch.uint8),
        clip.tokenize(["a", "b c"]),
    )
    with fake_cuda(waiting=True):
        clip = clip.on("cuda")
    with fake_cuda():
        for found, count in ((clip.encode_images(pixels), 3), (clip.encode_tokens(tokens), 2)):
            assert found.device.type == "cuda"
            assert found.dtype == torch.float32
            assert found.shape == (count, clip.identity.embed_dim)


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 224), (STUDENT, 32)], ids=["vit", "convolutions"])
def test_an_image_student_computes_on_the_gpu(name: str, size: int) -> None:
    spec = student_spec(name, teacher_identity(), size)
    tower = build_student(spec)
    layout = torch.channels_last if has_convolutions(tower) else torch.contiguous_format
    assert has_convolutions(tower) == (name == STUDENT)
    with fake_cuda(waiting=True):
        tower.to(CUDA, memory_format=layout)
    with fake_cuda():
        images = normalise(torch.zeros(2, 3, size, size, dtype=torch.uint8, device=CUDA), spec.mean, spec.std)
        features_BD = F.normalize(tower(images.to(memory_format=layout)), dim=-1)
        assert features_BD.device.type == "cuda"
        assert features_BD.shape == (2, 16)


def test_a_text_student_computes_on_the_gpu() -> None:
    spec = text_spec("ViT-S-32-alt", teacher_identity())
    tower = build_text_student(spec)
    with fake_cuda(waiting=True):
        tower.to(CUDA)
    with fake_cuda():
        assert tower(torch.ones(2, 77, dtype=torch.int64, device=CUDA)).device.type == "cuda"


@pytest.mark.parametrize("k", [1, 3, 250])
def test_exact_search_multiplies_on_the_gpu(text_store: Store, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the very end, where there are no values for NumPy."""
    products: list[torch.device] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            products.extend(value.device for value in args[:2] if func.overloadpacket is torch.ops.aten.mm)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tensor.shape))
    with fake_cuda(waiting=True), Watch():
        scores, rows = ExactSearch(text_store, device="cuda").search(np.ones((5, 128), np.float16), k)
    assert scores.shape == rows.shape == (5, k)
    assert products
    assert {device.type for device in products} == {"cuda"}


def test_mixed_devices_and_waiting_are_seen() -> None:
    """What these tests rest on."""
    with fake_cuda():
        one, here = units(2), torch.zeros(2, WIDTH)
        with pytest.raises(RuntimeError, match=MIXED):
            one + here
        for waits in (one.sum().item, one.sum().tolist, partial(bool, one.sum() > 0)):
            with pytest.raises(DataDependentOutputException):
                waits()
        with pytest.raises(DynamicOutputShapeException):
            one[one[:, 0] > 0]
        with pytest.raises(RuntimeError, match=MIXED):
            one[torch.arange(2)]
        for copies in (here.to, partial(torch.as_tensor, 1.0, device=CUDA), partial(torch.tensor, [1.0], device=CUDA)):
            with pytest.raises(AssertionError, match="waited for"):
                copies(CUDA) if copies == here.to else copies()
        with pytest.raises(AssertionError, match="waited for"):
            one.cpu()
        with pytest.raises(AssertionError, match="waited for"):
            one.copy_(here)
        assert here.to(CUDA, non_blocking=True).is_cuda
        assert one.copy_(here, non_blocking=True).is_cuda
