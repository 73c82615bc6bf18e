"""What a tower does in training alone: gradient checkpointing and patch dropout."""

from __future__ import annotations

import copy
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_schemas import StudentSpec
from dimefm.errors import TrainingError
from dimefm.models.tower_training import checkpoint_gradients, drop_patches
from dimefm.models.towers import build_student, build_text_student, student_spec, text_spec
from dimefm.store.embedding_store import Store
from dimefm.training.config import LossConfig
from dimefm.training.distributed import ALONE
from dimefm.training.objective import Objective
from dimefm.training.run_folder import read_run
from dimefm.training.tower_trainer import TowerTrainer
from dimefm.training.train import train
from tests.processes import result_of
from tests.stores import teacher_identity
from tests.tiny_training import same, tiny_config, weights


def own_vit(layers: int = 2, width: int = 64) -> StudentSpec:
    """A small vision transformer of open_clip's own, of 32 px."""
    return replace(
        student_spec("ViT-S-32", teacher_identity(), 32),
        vision_cfg={"layers": layers, "width": width, "head_width": 32, "patch_size": 8, "image_size": 32},
    )


def spec_of(name: str) -> StudentSpec:
    return own_vit() if name == "own" else student_spec(name, teacher_identity(), None if name == "test_vit" else 32)


def gradients(tower: Any, spec: StudentSpec, *, accumulate: int, recomputes: bool) -> list[torch.Tensor]:
    """Of a step, and what batch norm has counted in it."""
    objective = Objective(LossConfig(vl=0, pvl=0, cosine=1), teacher_scale=100.0, dim=spec.embed_dim, mean_D=None)
    found = TowerTrainer(
        tower, objective, ALONE, prepare=lambda x: x, precision="fp32", accumulate=accumulate, recomputes=recomputes
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, spec.image_size, spec.image_size, generator=generator)
    teacher = torch.randn(8, spec.embed_dim, generator=generator)
    found.learn(images, teacher, None, None, seed=(0,), scaler=torch.amp.GradScaler("cpu", enabled=False))
    return [*[p.grad for p in tower.parameters() if p.grad is not None], *tower.buffers()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["own", "test_vit", "test_resnet"])
def test_what_is_computed_again_is_the_same_and_counts_once(name: str, accumulate: int) -> None:
    spec = spec_of(name)
    tower = build_student(spec)
    if name != "test_resnet":
        drop_patches(tower, name, 0.5)  # both times the same patches
    other = copy.deepcopy(tower)
    checkpoint_gradients(other, name)
    plain = gradients(tower, spec, accumulate=accumulate, recomputes=False)
    assert len(plain) == len(list(tower.parameters())) + len(list(tower.buffers()))
    assert all(map(torch.equal, plain, gradients(other, spec, accumulate=accumulate, recomputes=True)))


def test_towers_without_it_are_refused() -> None:
    resnet = build_student(replace(spec_of("own"), vision_cfg={"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}))
    with pytest.raises(TrainingError, match=r"RN has no gradient checkpointing\n.*--accumulate saves memory"):
        checkpoint_gradients(resnet, "RN")
    with pytest.raises(TrainingError, match="a thing has no gradient checkpointing"):
        checkpoint_gradients(torch.nn.Linear(2, 2), "a thing")
    checkpoint_gradients(build_text_student(text_spec("ViT-S-32", teacher_identity())), "a text tower")
    for name, tower in (("RN", resnet), ("test_resnet", build_student(spec_of("test_resnet")))):
        with pytest.raises(TrainingError, match=f"{name} is no plain vision transformer"):
            drop_patches(tower, name, 0.5)


@pytest.mark.parametrize("name", ["own", "test_vit"])
def test_patches_are_left_out_in_training_alone(name: str) -> None:
    spec = spec_of(name)
    tower = build_student(spec)
    plain, seen = copy.deepcopy(tower), []
    drop_patches(tower, name, 0.5)
    assert tower.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, spec.image_size, spec.image_size)
    norm = tower.trunk.norm if name == "test_vit" else tower.transformer
    norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1] - 1))
    assert not torch.equal(tower(images), plain(images))
    with torch.no_grad():
        assert torch.equal(tower.eval()(images), plain.eval()(images))
    assert seen == [seen[1] // 2, seen[1]]


def test_a_run_with_both_learns_and_keeps_them_out_of_the_student(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    words: dict[str, Any] = {"student": "test_vit", "image_size": None, "max_steps": 2, "checkpoint_every": 1}
    plain = tiny_config(image_store, text_store, tmp_path / "plain", **words)
    dropping = replace(plain, out=str(tmp_path / "dropping"), patch_dropout=0.5)
    again = replace(dropping, out=str(tmp_path / "again"), gradient_checkpointing=True, max_steps=1)
    for config in (plain, dropping, again):
        train(config)
    train(replace(again, max_steps=2, gradient_checkpointing=False), allow_changes=("max_steps",))
    assert not same(weights(plain.out), weights(dropping.out))
    assert same(weights(dropping.out), weights(again.out))
    assert read_run(dropping.out).student == read_run(plain.out).student
    with pytest.raises(TrainingError, match="test_resnet is no plain vision transformer"):
        train(tiny_config(image_store, text_store, tmp_path / "refused", patch_dropout=0.5))


def memory_of_a_step(recomputes: bool) -> int:
    """Bytes that the process grew by."""
    spec = own_vit(layers=12, width=256)
    tower = build_student(spec)
    if recomputes:
        checkpoint_gradients(tower, "own")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for parameter in tower.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tower(torch.randn(128, 3, 32, 32)).sum().backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.slow
def test_gradient_checkpointing_takes_less_memory() -> None:
    plain, checkpointed = (result_of(memory_of_a_step, recomputes) for recomputes in (False, True))
    assert plain > 3e8
    assert checkpointed < plain / 2
