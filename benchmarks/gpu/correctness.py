"""Whether the device computes what a CPU computes in float32 or wider: embeddings, losses with their gradients, exact
search. Then what must repeat itself (repeats.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import open_clip
import torch
from torch.nn.functional import normalize

from benchmarks.gpu import repeats
from benchmarks.gpu.inputs import named, spread
from benchmarks.gpu.kit import Kit
from benchmarks.simulated import simulate
from cache_schemas.identity import Precision
from dimefm.images.preprocess import Preprocess
from dimefm.models.clip import Clip, load_clip
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.store.embedding_store import Store
from dimefm.training.config import LossConfig
from dimefm.training.objective import Objective

_CPU = torch.device("cpu")
_PRECISIONS: tuple[tuple[Precision, float], ...] = (("fp32", 0.9999), ("fp16", 0.999), ("bf16", 0.99))
"""The least cosine that is right; a GPU's convolutions in fp32 are TF32 ones by default."""
_NO_LOSS = LossConfig(vl=0.0, pvl=0.0)


def correctness(kit: Kit) -> None:
    """All of it. Training comes first, since it forks."""
    kit.each(repeats.resume, embeddings, losses, search, repeats.shard)


def embeddings(kit: Kit) -> None:
    """Cosines of the device's embeddings to those of the CPU in float32: the sample's teacher, then the large one with
    random weights."""
    where = kit.inputs.trained_teacher()
    _compare(kit, "sample teacher", lambda precision, device: load_clip(where, precision=precision, device=str(device)))
    if kit.sizes.teacher and kit.enough(25, f"embeddings of {kit.sizes.teacher}"):
        name = kit.sizes.teacher
        torch.manual_seed(0)
        model = spread(open_clip.create_model(name))
        _compare(kit, name, lambda precision, device: named(copy.deepcopy(model), name, precision, device))


def _compare(kit: Kit, name: str, load: Callable[[Precision, torch.device], Clip]) -> None:
    reference = load("fp32", _CPU)
    preprocess = Preprocess(reference.identity.preprocessing)
    pixels = torch.stack([preprocess(jpeg) for jpeg in kit.inputs.sample_images(kit.sizes.compared)])
    texts = kit.inputs.sentences()[: kit.sizes.compared]
    expected = {"images": reference.encode_images(pixels), "sentences": reference.encode_texts(texts)}
    expected = {kind: normalize(embedding_BD.double(), dim=-1) for kind, embedding_BD in expected.items()}
    del reference
    for precision, least in _PRECISIONS:
        clip = load(precision, kit.device)
        found = {"images": clip.encode_images(pixels), "sentences": clip.encode_texts(texts)}
        for kind, embedding_BD in found.items():
            cosine_B = (normalize(embedding_BD.cpu().double(), dim=-1) * expected[kind]).sum(dim=1)
            among = float((expected[kind] @ expected[kind].T).mean())
            at = f"median 1 - cosine {1 - float(cosine_B.median()):.1e}, mean cosine among them {among:.2f}"
            what = f"{name}, {kind}, {precision}: least cosine to fp32 on the CPU"
            kit.check(what, round(float(cosine_B.min()), 7), "", at, least=least)


def losses(kit: Kit) -> None:
    """Each loss and its gradient by the student's embeddings, against float64 on the CPU. Off by 1 % is wrong, or by
    three times what float32 is off on the CPU: of udist, whose targets are nearly one-hot, the gradient is by 1 %."""
    images, texts, width = kit.sizes.train_batch, 8 * kit.sizes.train_batch, kit.sizes.width
    draw = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return normalize(torch.randn(rows, width, generator=draw, dtype=torch.float64), dim=-1)

    teacher, text_TD, noise = unit(images), unit(texts), unit(images)
    student = normalize(teacher + 3 * noise, dim=-1)  # nearer, and pvl is almost 0
    row_B = torch.arange(images) // 2 - 1  # two images to a sentence, some without
    for name in LossConfig.WEIGHTS:
        config = replace(_NO_LOSS, **{name: 1.0})

        def value(device: torch.device, dtype: torch.dtype, config: LossConfig = config) -> tuple[torch.Tensor, ...]:
            objective = Objective(config, teacher_scale=100.0, dim=width, mean_D=teacher.mean(dim=0)).to(device, dtype)
            teacher_BD, student_BD, texts_TD = (x.to(device, dtype) for x in (teacher, student, text_TD))
            student_BD = student_BD.detach().requires_grad_()
            pair = (texts_TD[row_B.clamp(min=0)], row_B.to(device)) if config.contrastive else None
            loss, _ = objective(teacher_BD, student_BD, texts_TD, pair)
            (gradient,) = torch.autograd.grad(loss, student_BD)
            return loss.detach().cpu().double(), gradient.cpu().double()

        exact, ours, usual = (
            value(device, dtype)
            for device, dtype in ((_CPU, torch.float64), (kit.device, torch.float32), (_CPU, torch.float32))
        )
        for part, true, found, other in zip(("loss", "gradient"), exact, ours, usual, strict=True):
            cpu = _error(other, true)
            at = f"B = {images}, T = {texts}; float32 on the CPU {cpu:.1e}"
            kit.check(f"{name}, {part}: relative error", _error(found, true), "", at, most=max(1e-2, 3 * cpu))


def _error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


def search(kit: Kit) -> None:
    """Scores of exact search against the CPU's, and that the rows it names have these scores."""
    path = kit.inputs.folder / "search.zarr"
    rows = min(kit.sizes.rows[0], 65536)
    simulate(path, "text", rows, kit.sizes.width, [])
    store = Store(str(path))
    values = store.read(0, rows)
    queries = values[:: max(1, rows // 512)].astype(np.float32)
    (expected, _), (scores, found) = (
        ExactSearch(store, device=device).search(queries, 10) for device in ("cpu", kit.device.type)
    )
    true = np.einsum("qd,qkd->qk", queries, values[found].astype(np.float32))
    at = f"{rows:,} rows, {len(queries)} queries, {kit.sizes.width} wide"
    kit.check("exact search: largest difference of scores to the CPU", _most(scores, expected), "", at, most=1e-3)
    kit.check("exact search: the same of its rows' own scores", _most(scores, true), "", at, most=1e-3)


def _most(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())
