"""TF32 products: where they are switched on, what they leave exact, and what they do to a student's logits."""

import pytest
import torch
from torch.nn import functional as F

from dimefm.system.matrix_products import similarities, tf32
from dimefm.training.losses import vl_loss

CUDA = torch.device("cuda")


def precision() -> object:
    """What float32 products on a GPU are set to, asked of this torch in the words that it wants."""
    settings = torch.backends.cuda.matmul
    return settings.fp32_precision if hasattr(settings, "fp32_precision") else settings.allow_tf32


def tf32_of(value: torch.Tensor, *, nearest: bool = True) -> torch.Tensor:
    """float32 with 10 bits of mantissa: what a tensor core multiplies."""
    bits = value.contiguous().view(torch.int32)
    if nearest:
        bits = bits + 0x0FFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


def units(rows: int, seed: int, width: int = 768) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_tf32_holds_within_the_block_alone() -> None:
    """Under warnings as errors: no word of a torch that this torch no longer wants."""
    before = precision()
    with tf32(CUDA):
        assert precision() in ("tf32", True)
    assert precision() == before
    with pytest.raises(ZeroDivisionError), tf32(CUDA):
        raise ZeroDivisionError
    assert precision() == before
    with tf32(torch.device("cpu")):
        assert precision() == before
    assert torch.get_float32_matmul_precision() == "highest", "who asks by the old name is refused an answer"


def test_a_float16_is_a_tf32_number() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()].float()
    assert len(finite) == 2**16 - 2**11
    for nearest in (True, False):
        assert torch.equal(tf32_of(finite, nearest=nearest), finite)
    assert not torch.equal(tf32_of(100 * finite), 100 * finite), "which is why no factor goes onto the teacher's side"


@pytest.mark.parametrize(("nearest", "logit", "gradient"), [(True, 1e-3, 1e-3), (False, 5e-3, 2e-3)])
def test_what_tf32_does_to_a_student(nearest: bool, logit: float, gradient: float) -> None:
    """The figures in dimefm.training.losses, with fewer texts."""
    teacher, text = units(64, 0).half().float(), units(512, 1).half().float()
    student = F.normalize(teacher + 0.3 * units(64, 2), dim=-1)
    rounded = tf32_of(student, nearest=nearest)
    error = 100 * (rounded.double() - student.double()) @ text.double().T
    assert error.pow(2).mean().sqrt() < logit
    gradients = []
    for value in (student, rounded):
        leaf = value.clone().requires_grad_()
        vl_loss(teacher, text, leaf, scale=100.0, temperature=1.0).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert (gradients[1] - gradients[0]).norm() < gradient * gradients[0].norm()


def test_similarities_have_the_gradient_of_a_product() -> None:
    one, other = units(3, 0, 5).double().requires_grad_(), units(4, 1, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(similarities, (one, other))
    assert torch.autograd.gradcheck(lambda one: similarities(one, other.detach()), (one,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_multiplies_float16_numbers_exactly_in_tf32() -> None:
    teacher, text, student = units(64, 0).half(), units(512, 1).half(), units(64, 2)
    exact = teacher.double() @ text.double().T
    found = similarities(teacher.float().to(CUDA), text.float().to(CUDA)).cpu().double()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    exact = student.double() @ text.double().T
    found = similarities(student.to(CUDA), text.float().to(CUDA)).cpu().double()
    assert 1e-6 < (found - exact).abs().max() < 2e-4, "not TF32: as exact as float32, or worse than cut-off bits"
