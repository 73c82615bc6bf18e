"""The losses against the values and gradients of the authors' own code, and against their own definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dimefm.losses import LossConfig, centred_loss, cosine_loss, distillation_loss, pvl_loss, udist_loss, vl_loss

GOLDEN = np.load(Path(__file__).parent / "golden" / "loss_reference.npz")
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


@pytest.mark.parametrize("case", CASES)
def test_total_and_gradient_are_the_authors(case: str) -> None:
    image, text, student, config = load(case)
    loss, _ = distillation_loss(image, text, F.normalize(student, dim=-1), config)
    loss.backward()
    assert loss.item() == pytest.approx(float(GOLDEN[f"{case}/loss"]), abs=1e-9)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), GOLDEN[f"{case}/grad"], rtol=0, atol=1e-9)


def test_vl_takes_more_texts_than_images() -> None:
    """Against the definition written out with loops."""
    generator = torch.Generator().manual_seed(0)
    image, text, student = (
        F.normalize(torch.randn(n, 6, dtype=torch.float64, generator=generator), dim=-1) for n in (3, 7, 3)
    )
    teacher_logits, student_logits = 100 * image @ text.T, 100 * student @ text.T

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()

    rows = sum(kl(teacher_logits[i], student_logits[i]) for i in range(3)) / 3
    columns = sum(kl(teacher_logits[:, j], student_logits[:, j]) for j in range(7)) / 7
    value = vl_loss(image, text, student, scale=100.0, temperature=1.0)
    assert value.item() == pytest.approx(float(rows + columns), abs=1e-12)


def test_a_perfect_student_has_no_loss() -> None:
    image = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    config = LossConfig(vl=1, pvl=1, udist=1, cosine=1, centred=1)
    loss, parts = distillation_loss(image, image, image, config, image.mean(dim=0))
    assert set(parts) == {"vl", "pvl", "udist", "cosine", "centred"}
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_centred_loss_sees_what_the_common_direction_hides() -> None:
    """Embeddings that share a large mean: the mean itself is nearly right by cosine, and worth nothing centred."""
    generator = torch.Generator().manual_seed(2)
    common = F.normalize(torch.randn(16, generator=generator), dim=0)
    teacher = F.normalize(common + 0.1 * torch.randn(32, 16, generator=generator), dim=-1)
    lazy = F.normalize(common + 0.01 * torch.randn(32, 16, generator=generator), dim=-1)
    assert cosine_loss(teacher, lazy) < 0.2
    assert centred_loss(teacher, lazy, teacher.mean(dim=0)) > 0.5


def test_no_loss_without_its_input() -> None:
    image = torch.eye(4)
    with pytest.raises(ValueError, match="needs text"):
        distillation_loss(image, None, image, LossConfig())
    with pytest.raises(ValueError, match="mean embedding"):
        distillation_loss(image, None, image, LossConfig(vl=0, pvl=0, centred=1))
    with pytest.raises(ValueError, match="every loss has weight 0"):
        distillation_loss(image, image, image, LossConfig(vl=0, pvl=0))
