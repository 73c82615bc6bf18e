"""Optimisers of timm beside AdamW, and learning rates by layer."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import muon
from timm.optim._param_groups import param_groups_layer_decay

from dimefm.errors import MismatchError, TrainingError
from dimefm.models.tower_layers import parameter_layers
from dimefm.models.towers import build_student, build_text_student, student_spec, text_spec
from dimefm.store.embedding_store import Store
from dimefm.training import optimizer as optimizer_module
from dimefm.training.before_training import require_startable
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import TrainConfig
from dimefm.training.optimizer import load_optimizer, optimizer_of, require_optimizer
from dimefm.training.recipes import paper
from dimefm.training.train import train
from tests.stores import teacher_identity
from tests.tiny_training import same, tiny_config, weights
from tests.training.test_train import interrupted_at

KNOWN = [
    name
    for name in timm.optim.list_optimizers()
    if optimizer_module._is_here(name) and name not in optimizer_module._REFUSED
]


def config(**changes: Any) -> TrainConfig:
    return paper("i", "t", "o", **{"weight_decay": 0.05, "lr": 1e-3, **changes})


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3))


def small_vit(folder: Path) -> Any:
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    (folder / "small.json").write_text(json.dumps({"vision_cfg": vision}))
    torch.manual_seed(0)
    return build_student(student_spec(str(folder / "small.json"), teacher_identity()))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range, side: int = 4) -> None:
    for step in numbers:
        optimizer.zero_grad()
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "sgd", "madgrad", "adafactor",
                                  pytest.param("all", marks=pytest.mark.slow)])  # fmt: skip
def test_a_checkpoint_has_all_that_an_optimizer_goes_by(name: str) -> None:
    """Two steps, and two more from a checkpoint, are four; of every optimizer that is taken, if all are asked for."""
    for one in KNOWN if name == "all" else [name]:
        model, other = small(), small()
        optimizer = optimizer_of(config(optimizer=one), [model], {})
        steps(model, optimizer, range(2))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        steps(model, optimizer, range(2, 4))
        file.seek(0)
        state, of_optimizer = torch.load(file, weights_only=True)
        other.load_state_dict(state)
        again = optimizer_of(config(optimizer=one), [other], {})
        load_optimizer(again, of_optimizer)
        steps(other, again, range(2, 4))
        assert same(model.state_dict(), other.state_dict()), one
        assert not same(model.state_dict(), small().state_dict()), f"{one} does nothing"
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0, 0.05}, one


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_muon_computes_in_the_precision_of_the_run(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, found = muon.zeropower_via_newtonschulz, set[torch.dtype]()
    usual = getattr(usual, "func", usual)

    def spy(*given: Any, dtype: torch.dtype = torch.float64, **named: Any) -> torch.Tensor:
        found.add(dtype)
        result: torch.Tensor = usual(*given, dtype=dtype, **named)
        return result

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", spy)
    for name in ("muon", "nmuon"):
        optimizer_of(config(optimizer=name), [small()], {})  # of a run before
        model = small()
        steps(model, optimizer_of(config(optimizer=name, precision=precision), [model], {}), range(1))
    assert found == {dtype}


@pytest.mark.parametrize("name", ["muon", "nadamuon"])
def test_muon_takes_weight_matrices_and_leaves_embeddings_to_adamw(name: str, tmp_path: Path) -> None:
    tower = small_vit(tmp_path)
    optimizer = optimizer_of(config(optimizer=name, weight_decay=0.0), [tower], {})
    steps(tower, optimizer, range(1), side=32)
    by_muon = {path for path, one in tower.named_parameters() if "momentum_buffer" in optimizer.state[one]}
    assert by_muon == {
        path
        for path, one in tower.named_parameters()
        if one.ndim > 1 and path != "positional_embedding"  # also a matrix, of 17 x 64
    }
    assert len(by_muon) == 10


def test_a_run_in_which_muon_took_the_positions_goes_on_so(tmp_path: Path) -> None:
    tower, again = small_vit(tmp_path), small_vit(tmp_path)
    optimizer = optimizer_of(config(optimizer="muon"), [tower], {})
    for group in optimizer.param_groups:
        group.pop("use_fallback", None)  # as an older release had it
    steps(tower, optimizer, range(1), side=32)
    again.load_state_dict(tower.state_dict())
    continued = optimizer_of(config(optimizer="muon"), [again], {})
    load_optimizer(continued, copy.deepcopy(optimizer.state_dict()))
    steps(tower, optimizer, range(1, 3), side=32)
    steps(again, continued, range(1, 3), side=32)
    assert "momentum_buffer" in continued.state[again.positional_embedding]
    assert same(tower.state_dict(), again.state_dict())


def test_the_default_is_fused_adamw_in_two_groups() -> None:
    optimizer = optimizer_of(config(betas=(0.8, 0.9), eps=1e-6), [small()], {})
    assert type(optimizer) is torch.optim.AdamW
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    for group in optimizer.param_groups:
        assert (group["fused"], group["betas"], group["eps"], group["lr"]) == (True, (0.8, 0.9), 1e-6, 1e-3)
        assert "lr_scale" not in group


def test_another_optimizer_has_its_own_betas_until_others_are_given() -> None:
    for given, expected in (({}, (0.9, 0.99)), ({"betas": (0.8, 0.95)}, (0.8, 0.95))):
        (group, _) = optimizer_of(config(optimizer="lion", **given), [small()], {}).param_groups
        assert group["betas"] == expected


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"optimizer": "lino"}, r"timm has no optimizer called 'lino'\n  remedy: did you mean 'lion'"),
        ({"optimizer": "banana"}, r"'banana'\n  remedy: timm.optim.list_optimizers\(\) lists them"),
        ({"optimizer": "fusedadam"}, "timm has no optimizer called 'fusedadam'"),
        ({"optimizer": "kron"}, "kron cannot be used: it draws random numbers that are in no checkpoint"),
        ({"optimizer": "adahessian"}, "adahessian cannot be used: it needs second derivatives"),
        ({"optimizer": "sgd", "betas": (0.8, 0.9)}, "no effect with optimizer sgd: betas"),
        ({"optimizer": "lion", "eps": 1e-6}, "no effect with optimizer lion: eps"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_anything_is_read(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(TrainingError, match=what):
        require_startable(config(**changes))
    require_optimizer(config(optimizer="sgd"))


# -- learning rates by layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "first", "last"),
    [
        ("ViT-S-32", 13, "positional_embedding", "proj"),
        ("RN50", 17, "conv3.weight", "attnpool.c_proj.bias"),
        ("test_vit", 7, "trunk.cls_token", "head.proj.weight"),
        ("resnet18", 9, "trunk.bn1.weight", "head.proj.weight"),
    ],
)
def test_layers_go_from_the_patches_to_the_projection(name: str, depth: int, first: str, last: str) -> None:
    tower = build_student(student_spec(name, teacher_identity()))
    layers = parameter_layers(tower, name)
    assert layers.keys() == dict(tower.named_parameters()).keys()
    assert set(layers.values()) == set(range(depth + 1))
    assert (layers[first], layers[last]) == (0, depth)


def test_a_text_tower_has_layers_too_and_one_of_unknown_kind_is_refused() -> None:
    layers = parameter_layers(build_text_student(text_spec("ViT-S-32", teacher_identity())), "x")
    assert (layers["token_embedding.weight"], layers["text_projection"]) == (0, 13)
    assert layers["transformer.resblocks.3.mlp.c_fc.bias"] == 4
    with pytest.raises(TrainingError, match="the layers of a thing are not known, by which layer_decay goes"):
        parameter_layers(small(), "a thing")


def test_rates_by_layer_are_those_of_timm() -> None:
    tower = build_student(student_spec("test_vit", teacher_identity()))
    optimizer = optimizer_of(config(layer_decay=0.5), [tower], {"test_vit": tower})
    mine = {p: (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(mine) == len(list(tower.parameters()))
    assert mine[tower.head.proj.weight] == (1.0, 0.05)
    listed = tower.trunk.no_weight_decay()
    for group in param_groups_layer_decay(tower.trunk, 0.05, no_weight_decay_list=listed, layer_decay=0.5):
        for parameter in group["params"]:  # the projection is one more layer
            assert mine[parameter] == (group["lr_scale"] / 2, group["weight_decay"])


def test_a_run_with_another_optimizer_and_rates_by_layer_goes_on_exactly(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"optimizer": "lion", "layer_decay": 0.7, "lr": 1e-3, "max_steps": 4, "checkpoint_every": 1}
    whole = tiny_config(image_store, text_store, tmp_path / "whole", **words)
    train(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    monkeypatch.setattr(Checkpoints, "save", interrupted_at(2))
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    for changed in ({"optimizer": "adamw"}, {"layer_decay": None}):
        with pytest.raises(MismatchError, match=next(iter(changed))):
            train(replace(cut, **changed))
        with pytest.raises(TrainingError, match=r"cannot change within a run: .* the state of its optimizer"):
            train(replace(cut, **changed), allow_changes=tuple(changed))
    train(cut)
    assert same(weights(whole.out), weights(cut.out))
    state = Checkpoints(cut.out).load()
    assert state
    groups = state["optimizer"]["param_groups"]
    rates = {round(group["lr"] / group["lr_scale"], 12) for group in groups}
    assert len(rates) == 1
    assert {round(group["lr_scale"], 6) for group in groups} == {round(0.7**power, 6) for power in range(6)}
    other = replace(whole, out=str(tmp_path / "other"), layer_decay=None)
    train(other)
    assert not same(weights(whole.out), weights(other.out))
