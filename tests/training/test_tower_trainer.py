"""A tower in training: passes that add up to one, the moving average, seeds of a step, compiled towers."""

import copy
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import multiprocessing
from torch.nn import functional as F

from dimefm.models.towers import build_student, student_spec
from dimefm.store.embedding_store import Store
from dimefm.training.batch_norm import SyncBatchNorm, set_statistics
from dimefm.training.config import LossConfig
from dimefm.training.distributed import ALONE, Place, join_group, leave_group
from dimefm.training.moving_average import MovingAverage
from dimefm.training.objective import Objective
from dimefm.training.tower_trainer import TowerTrainer
from dimefm.training.validation import Validation
from tests.making import read_tar, write_tar
from tests.processes import FORKING
from tests.training.test_distributed import free_port

LOSS = LossConfig(vl=0.7, pvl=0.3, udist=0.1, cosine=0.5, contrastive=0.1, queue=6, logit_scale="learned", scale=20.0)
IMAGES, TEXTS, WIDTH = 8, 12, 6


def units(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def tower(dropout: float = 0.0, norm: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(10, 16), torch.nn.BatchNorm1d(16) if norm else torch.nn.GELU()]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(dropout), torch.nn.Linear(16, WIDTH))


def trainer(place: Place = ALONE, module: torch.nn.Module | None = None, **changes: Any) -> TowerTrainer:
    objective = Objective(LOSS, teacher_scale=100.0, dim=WIDTH, mean_D=None)
    prepare = lambda inputs: inputs  # noqa: E731
    return TowerTrainer(module or tower(), objective, place, prepare=prepare, precision="fp32", **changes)


def two_steps(found: TowerTrainer, rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    """Of the second step, whose queue has the rows of the first: the gradients of the tower and of the learned scale,
    then the loss and its parts."""
    inputs = torch.randn(2, IMAGES, 10, generator=torch.Generator().manual_seed(1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parameters = [*found.module.parameters(), *found.objective.parameters()]
    for step in range(2):
        for parameter in parameters:
            parameter.grad = None
        batch = inputs[step][rank::world]
        teacher, text, pair = (
            units(IMAGES, step)[rank::world],
            units(TEXTS, 9),
            (units(IMAGES, 8), torch.arange(IMAGES)),
        )
        learned = found.learn(batch, teacher, text, pair, seed=(0, step), scaler=scaler)
        found.after_step(learned)
    return [*[p.grad for p in parameters if p.grad is not None], *learned.values.values()]


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["plain", "dropout"])
def test_passes_add_up_to_the_gradient_of_the_whole_batch(parts: int, dropout: float) -> None:
    whole, split = (trainer(module=tower(dropout), accumulate=n) for n in (1, parts))
    gradients = [two_steps(whole), two_steps(split)]
    assert len(gradients[0]) == 5 + 7
    if dropout:  # other masks than those of one pass: but the same in both passes over a part
        again = two_steps(trainer(module=tower(dropout), accumulate=parts))
        assert all(torch.equal(one, other) for one, other in zip(gradients[1], again, strict=True))
        return
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_second_pass_draws_what_the_first_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    found = trainer(module=tower(0.5), accumulate=2)
    features = found._features

    def watching(*args: Any) -> torch.Tensor:
        seen.append(features(*args))
        return seen[-1]

    monkeypatch.setattr(found, "_features", watching)
    two_steps(found)
    first, second, first_again, second_again = seen[:4]
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(seen[4], first), "both steps drew the same"


def test_batch_norm_counts_each_part_once() -> None:
    found = trainer(module=tower(norm=True), accumulate=2)
    two_steps(found)
    assert int(found.module[1].num_batches_tracked) == 4


def one_of_many(rank: int, world: int, port: int, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # of DistributedDataParallel: each process would say it
    place = join_group("cpu")
    for accumulate in (1, 2):
        gradients = two_steps(trainer(place, accumulate=accumulate), rank, world)
        torch.save(gradients, f"{out}/{rank}-{accumulate}.pt")
    (Path(out) / "norm").mkdir(exist_ok=True)
    for kind in ("sync", "local"):
        found = trainer(place, tower(norm=True), ema=0.5, batch_norm=kind)
        gradients = two_steps(found, rank, world)
        torch.save((gradients, statistics(found)), f"{out}/norm/{kind}-{rank}.pt")
    leave_group(place)


def statistics(found: TowerTrainer) -> list[torch.Tensor]:
    """Those of batch norm in the tower and in its moving average."""
    average = found.moving_average
    assert average
    return [*found.module.buffers(), *average.module.buffers()]


def compiled_one_of_two(rank: int, world: int, port: int, out: str, cache: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{rank}"
    torch.set_num_threads(1)
    place = join_group("cpu")
    for accumulate in (1, 2):
        gradients = two_steps(trainer(place, accumulate=accumulate, compile=True), rank, world)
        torch.save(gradients, f"{out}/{rank}-{accumulate}.pt")
    found = trainer(place, tower(norm=True), ema=0.5, compile=True)
    torch.save([*two_steps(found, rank, world), *statistics(found)], f"{out}/{rank}-norm.pt")
    leave_group(place)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_processes_and_passes_have_the_gradient_of_one(tmp_path: Path) -> None:
    (tmp_path / "gradients").mkdir()
    arguments = (2, free_port(), str(tmp_path / "gradients"), str(tmp_path / "compiled"))
    multiprocessing.start_processes(
        compiled_one_of_two, arguments, nprocs=2, start_method=FORKING.get_start_method()
    )  # fmt: skip
    alone, found = trainer(module=tower(norm=True), ema=0.5), sorted((tmp_path / "gradients").iterdir())
    plain, normed = two_steps(trainer()), [*two_steps(alone), *statistics(alone)]
    assert len(found) == 6
    for path in found:
        expected = normed if "norm" in path.name else plain
        for mine, whole in zip(torch.load(path, weights_only=True), expected, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5, msg=path.name)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_and_passes_have_the_gradient_of_one(world: int, tmp_path: Path) -> None:
    """With the queue and a learned scale: every switch that looks at the whole batch."""
    arguments = (world, free_port(), str(tmp_path))
    multiprocessing.start_processes(one_of_many, arguments, nprocs=world, start_method=FORKING.get_start_method())
    expected = two_steps(trainer())
    for path in sorted(tmp_path.glob("*.pt")):
        for mine, whole in zip(torch.load(path, weights_only=True), expected, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5, msg=path.name)
    alone = trainer(module=tower(norm=True), ema=0.5)
    expected, whole_statistics = two_steps(alone), statistics(alone)
    for rank in range(world):
        gradients, found = torch.load(tmp_path / "norm" / f"sync-{rank}.pt", weights_only=True)
        for mine, whole in zip([*gradients, *found], [*expected, *whole_statistics], strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
    local = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "norm").glob("local-*"))]
    for gradients, found in local:
        assert not torch.allclose(gradients[0], expected[0], rtol=1e-3), "as with statistics of all"
        assert all(map(torch.equal, found, local[0][1])), "the statistics depend on the process"
        torch.testing.assert_close(found[0], local[0][1][0])


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5, 3)])
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.1), (False, None)])
def test_a_batch_norm_over_processes_is_the_usual_one(
    shape: tuple[int, ...], affine: bool, momentum: float | None
) -> None:
    """Values, gradients and statistics, in a single process; several are above."""
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    usual = kind(4, affine=affine, momentum=momentum).double()
    for parameter in usual.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2.0)
    other = copy.deepcopy(usual)
    other.__class__, other.place = SyncBatchNorm, ALONE
    found = []
    for norm in (usual, other):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul_(3).add_(2)
        y = norm(x.requires_grad_())
        (y.sin() * torch.arange(y.numel()).view(y.shape)).sum().backward()
        found.append([y.detach(), x.grad, *[p.grad for p in norm.parameters()], *norm.buffers(), norm.eval()(x)])
    assert len(found[0]) == 6 + 2 * affine
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


def test_a_batch_norm_of_timm_keeps_its_activation_and_names_over_processes() -> None:
    usual = timm.layers.BatchNormAct2d(4, act_layer=torch.nn.SiLU)
    other = torch.nn.Sequential(copy.deepcopy(usual))
    set_statistics(other, "sync", Place(0, 2, torch.device("cpu")))
    assert type(other[0]) is SyncBatchNorm
    assert other[0].state_dict().keys() == usual.state_dict().keys()
    other[0].place = ALONE
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other(x), usual(x))
    half = x.bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    other(half).float().square().sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_frozen_statistics_stay_as_they_are(cifar10: str, prompt_store: Store) -> None:
    spec = student_spec("test_resnet", prompt_store.schema.teacher, 32)
    found = trainer(module=build_student(spec), batch_norm="frozen", ema=0.5)
    before = [value.clone() for value in found.module.buffers()]
    Validation((cifar10,), prompt_store, spec, ALONE, torch.float32).run({"": (found.module, None)})
    found.module(torch.randn(2, 3, 32, 32))
    assert found.module.training
    assert before
    assert all(map(torch.equal, before, found.module.buffers()))


def test_the_average_follows_its_formula() -> None:
    module = tower(norm=True)
    average = MovingAverage(module, 0.5)
    expected, mean = module[0].weight.detach().clone(), module[1].running_mean.clone()
    for step, decay in enumerate((0.1, 2 / 11, 0.25)):
        with torch.no_grad():
            module[0].weight += 1 + step
            module[1].running_mean += 1
            module[1].num_batches_tracked += 1
        average.update(module)
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
        mean = decay * mean + (1 - decay) * module[1].running_mean
    torch.testing.assert_close(average.module[0].weight, expected)
    torch.testing.assert_close(average.module[1].running_mean, mean)
    assert int(average.module[1].num_batches_tracked) == 3
    other = MovingAverage(tower(norm=True), 0.5)
    other.load_state_dict(average.state_dict())
    for one in (average, other):
        one.update(module)
    assert torch.equal(average.module[0].weight, other.module[0].weight)


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_tower_computes_the_same() -> None:
    towers = trainer(), trainer(compile=True)
    assert towers[0].state_dict()["model"].keys() == towers[1].state_dict()["model"].keys(), "saved under other names"
    plain, compiled = map(two_steps, towers)
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forgets", ["at each change of mode", "when it trains"])
@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224"])
def test_an_average_is_validated_with_the_weights_that_it_has_now(
    name: str, forgets: str, cifar10: str, prompt_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeViT's kind keeps its tables of biases in eval mode; timm up to 1.0.15 and later does so until it trains."""
    for labelled in ("classnames.txt", "templates.txt"):
        (tmp_path / labelled).write_bytes((Path(cifar10) / labelled).read_bytes())
    write_tar(tmp_path / "0.tar", read_tar(Path(cifar10) / "test-00000.tar", 2 * 4))
    spec = student_spec(name, prompt_store.schema.teacher)
    module = build_student(spec)
    parts = [part for part in module.modules() if hasattr(part, "attention_bias_cache")]
    assert parts
    if forgets == "when it trains":
        for kind in {type(part) for part in parts}:
            monkeypatch.setattr(kind, "train", _forgets_when_it_trains)
    average = MovingAverage(module, 0.5)
    validation = Validation((str(tmp_path),), prompt_store, spec, ALONE, torch.float32)
    validation.run({"_ema": (average.module, None)})
    with torch.no_grad():
        for part in parts:
            part.attention_biases += torch.randn_like(part.attention_biases)
    average.update(module)
    validation.run({"_ema": (average.module, None)})
    fresh, images = build_student(spec).eval(), torch.randn(1, 3, spec.image_size, spec.image_size)
    fresh.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        assert torch.equal(average.module(images), fresh(images))


def _forgets_when_it_trains(self: Any, mode: bool = True) -> None:
    torch.nn.Module.train(self, mode)
    if mode:
        self.attention_bias_cache = {}
