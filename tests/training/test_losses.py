"""The losses against the values and gradients of the authors' own code, and against their own definition."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dimefm.commands.options import fields_of
from dimefm.training import losses
from dimefm.training.config import LossConfig
from dimefm.training.losses import centred_loss, contrastive_loss, cosine_loss, pvl_loss, udist_loss, vl_loss
from dimefm.training.objective import LOSSES, Objective

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "loss_reference.npz")
CASES = ("case0", "case1", "case2")


def load(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LossConfig]:
    def unit(name: str) -> torch.Tensor:
        return F.normalize(torch.from_numpy(GOLDEN[f"{case}/{name}"]), dim=-1)

    student = torch.from_numpy(GOLDEN[f"{case}/student_image"]).requires_grad_()
    (vl_t, pvl_t, udist_t), (vl, pvl, udist) = GOLDEN[f"{case}/temperature"], GOLDEN[f"{case}/weight"]
    config = LossConfig(
        vl=float(vl),
        pvl=float(pvl),
        udist=float(udist),
        vl_temperature=float(vl_t),
        pvl_temperature=float(pvl_t),
        udist_temperature=float(udist_t),
    )
    return unit("teacher_image"), unit("teacher_text"), student, config


def units(*sizes: int, seed: int = 0, width: int = 6) -> list[torch.Tensor]:
    """Unit-norm float64 embeddings, one tensor a size."""
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, width, dtype=torch.float64, generator=generator), dim=-1) for n in sizes]


def objective(config: LossConfig, mean_D: torch.Tensor | None = None, width: int = 6) -> Objective:
    return Objective(config, teacher_scale=50.0, dim=width, mean_D=mean_D).double()


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(softmax(p) || softmax(q)) of two vectors."""
    return (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()


@pytest.mark.parametrize("case", CASES)
def test_each_loss_has_the_authors_value(case: str) -> None:
    image, text, student, c = load(case)
    student = F.normalize(student, dim=-1)
    values = {
        "vl": vl_loss(image, text, student, scale=c.scale, temperature=c.vl_temperature),
        "pvl": pvl_loss(image, student, scale=c.scale, temperature=c.pvl_temperature),
        "udist": udist_loss(image, student, scale=c.scale, temperature=c.udist_temperature),
    }
    for name, value in values.items():
        assert value.item() == pytest.approx(float(GOLDEN[f"{case}/{name}"]), abs=1e-9), name


@pytest.mark.parametrize("chunk", [2**24, 5])
@pytest.mark.parametrize("case", CASES)
def test_total_and_gradient_are_the_authors(case: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(losses, "KEPT_LOGITS", chunk)
    image, text, student, config = load(case)
    loss, _ = objective(config)(image, F.normalize(student, dim=-1), text)
    loss.backward()
    assert loss.item() == pytest.approx(float(GOLDEN[f"{case}/loss"]), abs=1e-9)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), GOLDEN[f"{case}/grad"], rtol=0, atol=1e-9)


def vl_by_definition(
    image: torch.Tensor, text: torch.Tensor, student: torch.Tensor, scales: tuple[float, torch.Tensor],
    queue: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Written out with loops: the queue stands among the images of the second term alone."""
    teacher_RT = scales[0] * torch.cat([image, queue[0]]) @ text.T
    student_RT = scales[1] * torch.cat([student, queue[1]]) @ text.T
    rows = sum(kl(teacher_RT[i], student_RT[i]) for i in range(len(image))) / len(image)
    columns = sum(kl(teacher_RT[:, j], student_RT[:, j]) for j in range(len(text))) / len(text)
    return torch.as_tensor(rows + columns)


@pytest.mark.parametrize(("chunk", "kept"), [(2**24, 2**26), (14, 2**26), (14, 1)], ids=["whole", "kept", "recomputed"])
@pytest.mark.parametrize("queued", [0, 4])
def test_vl_and_its_gradients_are_those_of_the_definition(
    chunk: int, kept: int, queued: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More texts than images, a scale that is learned, and images of a queue."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(losses, "KEPT_LOGITS", kept)
    image, text, student, *queue = units(3, 7, 3, queued, queued)
    found = []
    for loss in (vl_loss, vl_by_definition):
        mine = student.clone().requires_grad_()
        scale = torch.tensor(15.0, dtype=torch.float64, requires_grad=True)
        if loss is vl_loss:
            value = vl_loss(
                image, text, mine, scale=40.0, temperature=2.0, student_scale=scale, queue=(queue[0], queue[1])
            )
        else:
            value = vl_by_definition(image, text, mine, (20.0, scale / 2), (queue[0], queue[1]))
        (3 * value).backward()
        found.append((value.detach(), mine.grad, scale.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_vl_needs_no_more_memory_for_more_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made, beside the texts themselves."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 8192)
    monkeypatch.setattr(losses, "KEPT_LOGITS", 8192)
    image, text, student = units(16, 4096, 16)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, torch.Tensor)
                           and not func.is_view)  # fmt: skip
            return out

    with Watch():
        vl_loss(image, text, student.requires_grad_(), scale=100.0, temperature=1.0).backward()
    assert max(largest) <= 8192, "more than a chunk, and than two sums a text"


def between_images_by_definition(
    loss: Callable[..., torch.Tensor], image: torch.Tensor, student: torch.Tensor, scales: tuple[float, torch.Tensor],
    queue: tuple[torch.Tensor, torch.Tensor], masked: bool,
) -> torch.Tensor:  # fmt: skip
    """Written out with loops: pvl or udist."""
    images = torch.cat([image, queue[0]])
    keys = images if loss is pvl_loss else torch.cat([student, queue[1]])
    others = [[j for j in range(len(keys)) if j != i or not masked] for i in range(len(image))]
    rows = (kl(scales[0] * images[o] @ image[i], scales[1] * keys[o] @ student[i]) for i, o in enumerate(others))
    return torch.as_tensor(2 * sum(rows) / len(image))


@pytest.mark.parametrize(("chunk", "kept"), [(2**24, 2**26), (12, 2**26), (12, 1)], ids=["whole", "kept", "recomputed"])
@pytest.mark.parametrize("queued", [0, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [pvl_loss, udist_loss])
def test_pvl_and_udist_and_their_gradients_are_those_of_the_definition(
    loss: Callable[..., torch.Tensor], masked: bool, queued: int, chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each image's own embedding left out, a scale that is learned, and images of a queue."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(losses, "KEPT_LOGITS", kept)
    image, student, *queue = units(5, 5, queued, queued)
    found = []
    for written_out in (False, True):
        mine = student.clone().requires_grad_()
        scale = torch.tensor(15.0, dtype=torch.float64, requires_grad=True)
        if written_out:
            rest = ((40 / 3, scale / 3), (queue[0], queue[1]), masked)
            value = between_images_by_definition(loss, image, mine, *rest)
        else:
            value = loss(
                image, mine, scale=40.0, temperature=3.0, student_scale=scale, mask_diagonal=masked,
                queue=(queue[0], queue[1]),
            )  # fmt: skip
        (3 * value).backward()
        found.append((value.detach(), mine.grad, scale.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_contrastive_has_the_gradient_of_the_images_with_a_sentence_alone() -> None:
    student, text = units(4, 4)
    found = []
    for images in (4, 3):
        mine = student.clone().requires_grad_()
        contrastive_loss(mine[:images], text[:images], torch.tensor([3, 8, 5, -1])[:images], scale=10.0).backward()
        found.append(mine.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-15)
    mine = student.clone().requires_grad_()
    contrastive_loss(mine, text, torch.full((4,), -1), scale=10.0).backward()
    assert mine.grad is not None
    assert not mine.grad.any()


@pytest.mark.parametrize("chunk", [2**24, 500])
def test_float32_knows_what_an_own_embedding_leaves_to_others(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At T = 3 an image's own embedding has all but 1e-5 of pvl's target: the rest is what is learned."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    common, image, noise = units(1, 64, 64, width=256)
    image = F.normalize(common + image, dim=-1).half().double()
    student, gradients = F.normalize(image + 0.5 * noise, dim=-1), []
    for dtype in (torch.float32, torch.float64):
        mine = student.to(dtype).requires_grad_()
        pvl_loss(image.to(dtype), mine, scale=100.0, temperature=3.0).backward()
        assert mine.grad is not None
        gradients.append(mine.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


def test_contrastive_is_clips_loss_without_shared_sentences_as_negatives() -> None:
    student, text = units(4, 4)
    rows = torch.tensor([3, 8, 3, -1])  # the first and the third image share a sentence, the last has none
    logits = 10 * student[:3] @ text[:3].T
    expected = 0.0
    for i, others in enumerate(([0, 1], [0, 1, 2], [1, 2])):
        for line in (logits[i], logits[:, i]):
            expected -= float(line[i] - line[others].logsumexp(0)) / 6
    assert contrastive_loss(student, text, rows, scale=10.0).item() == pytest.approx(expected, rel=1e-12)
    assert contrastive_loss(student, text, torch.full((4,), -1), scale=10.0).item() == 0


def test_a_perfect_student_has_no_loss() -> None:
    image = units(5, seed=1)[0]
    config = LossConfig(vl=1, pvl=1, udist=1, cosine=1, centred=1)
    loss, parts = objective(config, image.mean(dim=0))(image, image, image)
    assert set(parts) == {"vl", "pvl", "udist", "cosine", "centred"}
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_centred_loss_sees_what_the_common_direction_hides() -> None:
    """Embeddings that share a large mean: the mean itself is nearly right by cosine, and worth nothing centred."""
    generator = torch.Generator().manual_seed(2)
    common = F.normalize(torch.randn(16, generator=generator), dim=0)
    teacher = F.normalize(common + 0.1 * torch.randn(32, 16, generator=generator), dim=-1)
    lazy = F.normalize(common + 0.01 * torch.randn(32, 16, generator=generator), dim=-1)
    assert cosine_loss(teacher, lazy) < 0.2
    assert centred_loss(teacher, lazy, teacher.mean(dim=0)) > 0.5


def test_the_temperature_squared_keeps_gradients_from_shrinking() -> None:
    """In the limit of high temperatures the gradient by the logits falls with T^2 (Hinton et al. 2015)."""
    image, text, student = units(4, 6, 4)
    norms = {}
    for squared in (False, True):
        for temperature in (1000.0, 4000.0):
            mine = student.clone().requires_grad_()
            config = LossConfig(vl=1, pvl=0, vl_temperature=temperature, square_temperature=squared)
            objective(config)(image, mine, text)[0].backward()
            assert mine.grad is not None
            norms[squared, temperature] = mine.grad.norm().item()
    assert norms[False, 4000.0] / norms[False, 1000.0] == pytest.approx(1 / 16, rel=0.05)
    assert norms[True, 4000.0] / norms[True, 1000.0] == pytest.approx(1, rel=0.05)


def test_the_logit_scale_is_fixed_the_teachers_or_learned() -> None:
    image, text, student = units(4, 6, 4)

    def value(**changes: object) -> tuple[float, Objective]:
        made = objective(LossConfig(vl=1, pvl=0, **changes))  # type: ignore[arg-type]
        return made(image, student.clone().requires_grad_(), text)[0], made

    fixed, teachers = (vl_loss(image, text, student, scale=s, temperature=1.0).item() for s in (100.0, 50.0))
    assert value()[0].item() == pytest.approx(fixed)
    assert value(logit_scale="teacher")[0].item() == pytest.approx(teachers)
    loss, made = value(logit_scale="learned", scale=50.0)
    assert loss.item() == pytest.approx(teachers)
    loss.backward()
    assert made.log_scale is not None
    assert made.log_scale.grad is not None
    assert made.log_scale.grad.abs() > 0
    with torch.no_grad():
        made.log_scale += 100
    made.after_step(image, student)
    assert made.log_scale.exp().item() == pytest.approx(100)


def test_the_queue_has_the_last_rows_and_survives_a_checkpoint() -> None:
    made = objective(LossConfig(queue=5))
    rows = units(3, 3, 3)
    for batch in rows:
        made.after_step(batch, -batch)
    other = objective(LossConfig(queue=5))
    other.load_state_dict(made.state_dict())
    for queue in (made._queue(), other._queue()):
        assert queue is not None
        kept = {tuple(row) for row in queue[0].float().tolist()}
        assert kept == {tuple(row) for row in torch.cat(rows)[-5:].float().tolist()}
        assert torch.equal(queue[1], -queue[0])
    made = objective(LossConfig(queue=5))
    made.after_step(rows[0], rows[0])
    queue = made._queue()
    assert queue is not None
    assert len(queue[0]) == 3, "rows that were never given count"


def test_no_loss_without_its_input() -> None:
    image = torch.eye(6, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs text"):
        objective(LossConfig())(image, image)
    with pytest.raises(ValueError, match="mean embedding"):
        objective(LossConfig(vl=0, pvl=0, centred=1))(image, image)
    with pytest.raises(ValueError, match="needs pairs"):
        objective(LossConfig(vl=0, pvl=0, contrastive=1))(image, image)
    with pytest.raises(ValueError, match="every loss has weight 0"):
        objective(LossConfig(vl=0, pvl=0))(image, image)


def test_every_loss_is_in_every_place() -> None:
    places = {
        "a function NAME_loss in training/losses.py": {
            name.removesuffix("_loss") for name in vars(losses) if name.endswith("_loss") and not name.startswith("_")
        },
        "a line in LOSSES of training/objective.py": set(LOSSES),
        "its name in LossConfig.WEIGHTS of training/config.py": set(LossConfig.WEIGHTS),
        "a field of LossConfig in training/config.py": {field.name for field in fields(LossConfig)},
        "a word in the line below TrainConfig.loss": set(
            re.findall(r"\w+", fields_of("dimefm.training.config", "TrainConfig")["loss"].words)
        ),
        "a row in the table of losses of docs/training.md": set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M)),
    }
    names = sorted({name for known in list(places.values())[:3] for name in known})
    missing = [
        f"{name} needs {place}" for name in sorted(names) for place, known in places.items() if name not in known
    ]
    assert not missing


def test_switches_without_effect_are_named() -> None:
    config = LossConfig(vl=0, pvl=0, cosine=1, queue=8, mask_diagonal=True, square_temperature=True, scale=-1,
                        logit_scale="learned")  # fmt: skip
    found = "; ".join(config.problems())
    for name in ("queue", "mask_diagonal", "square_temperature", "logit_scale", "scale must be above 0"):
        assert name in found
    assert not LossConfig().problems()
