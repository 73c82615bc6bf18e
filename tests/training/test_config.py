"""The config of a run: numbers that make no sense, recipes with changes, and what is said before a run begins."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dimefm.errors import TrainingError
from dimefm.training.before_training import (
    notes_on_inputs,
    notes_on_length,
    notes_on_rate,
    require_changeable,
    require_startable,
)
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.recipes import RECIPES, best, best_vit, paper, sample, sample_paper

NAN, INF = float("nan"), float("inf")


def config(**changes: Any) -> TrainConfig:
    return paper("i", "t", "o", **changes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weight_decay": -1.0}, "weight_decay must not be below 0, found -1.0"),
        ({"lr": NAN}, "lr must be finite, found nan"),
        ({"epochs": INF}, "epochs must be finite, found inf"),
        ({"min_lr": -1e-5}, "min_lr must not be below 0"),
        ({"warmup_lr": -1.0}, "warmup_lr must not be below 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be below 0"),
        ({"val_every": 0}, "val_every must be above 0"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"clip_grad": -1.0}, "clip_grad must be above 0"),
        ({"seed": -1}, "seed must not be below 0"),
        ({"seed": 2**63}, "seed must be below 2"),
        ({"betas": (0.9, 1.0)}, "betas must be 0 <= beta < 1"),
        ({"betas": (0.9, NAN)}, "betas must be finite"),
        ({"crop_scale": (1.0, 0.08)}, "crop_scale must be 0 < low <= high <= 1"),
        ({"ema": 1.5}, "ema must lie between 0 and 1"),
        ({"ema": NAN}, "ema must be finite"),
        ({"layer_decay": 1.0}, "layer_decay must lie between 0 and 1, found 1.0"),
        ({"patch_dropout": 1.0}, "patch_dropout must be below 1, found 1.0"),
        ({"patch_dropout": -0.5}, "patch_dropout must not be below 0, found -0.5"),
        ({"batch_norm": "frozen"}, "batch_norm frozen needs init: random weights have no statistics"),
        ({"init": "timm", "init_mean": (122.0, 116.0, 103.0)}, "init_mean is in parts of 1"),
        ({"init": "timm", "init_std": (0.0, 0.2, 0.2)}, "init_std must be above 0"),
        ({"loss": LossConfig(vl=NAN)}, "loss.vl must be finite"),
        ({"loss": LossConfig(pvl=-1.0)}, "loss.pvl must not be below 0, found -1.0"),
        ({"loss": LossConfig(vl_temperature=0.0)}, "loss.vl_temperature must be above 0"),
        ({"loss": LossConfig(scale=INF)}, "loss.scale must be finite"),
        ({"loss": LossConfig(scale=101.0, logit_scale="learned")}, "loss.scale must be from 1 to 100 to be learned"),
        ({"text_student": "x", "text_loss": LossConfig(cosine=-1.0)}, "text_loss.cosine must not be below 0"),
        ({"text_mix": TextMix(random=2.0, selected=-1.0)}, "text_mix.selected must not be below 0"),
        ({"text_mix": TextMix(random=NAN)}, "text_mix.random must be finite"),
        ({"text_mix": TextMix(random=0.5)}, "the text mix random=0.5 does not add up to 1"),
        ({"lr": "1e-3"}, "lr must be a number, found '1e-3'"),
        ({"log_to": "wandb", "log_project": "a/b"}, "log_project may have letters, digits, - and _, found 'a/b'"),
        ({"log_project": "mine"}, "log_project has no effect without log_to"),
    ],
)  # fmt: skip
def test_a_number_that_makes_no_sense_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(TrainingError) as caught:
        config(**changes)
    assert what in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize("kind", [TrainConfig, LossConfig, TextMix])
def test_no_number_may_be_nan(kind: type[Any]) -> None:
    """Every float of a config, also one that is added."""
    names = [field.name for field in fields(kind) if "float" in str(field.type)]
    assert names
    for name in names:
        value: Any = (
            tuple([NAN] * 3) if name.startswith(("init_", "image_")) else (NAN, NAN) if name[0] in "bc" else NAN
        )
        value = NAN if name in ("cosine", "centred", "contrastive", "clip_grad") else value
        part = kind(**{name: value}) if kind is not TrainConfig else None
        changes = {LossConfig: {"loss": part}, TextMix: {"text_mix": part}}.get(kind, {name: value, "init": "timm"})
        with pytest.raises(TrainingError, match=f"{name} must be finite"):
            config(**changes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_changes_by_name(recipe: str) -> None:
    plain = RECIPES[recipe]("i", "t", "o")
    changed = RECIPES[recipe]("i", "t", "o", student="resnet18", lr=1e-2)
    assert changed == replace(plain, student="resnet18", lr=1e-2, image_size=None)  # its own
    assert RECIPES[recipe]("i", "t", "o", student="resnet18", image_size=96).image_size == 96
    assert RECIPES[recipe]("i", "t", "o", student=plain.student) == plain
    with pytest.raises(TrainingError, match=r"no field of TrainConfig is called 'weight_decai'\n.*'weight_decay'\?"):
        RECIPES[recipe]("i", "t", "o", weight_decai=0.1)
    with pytest.raises(TrainingError, match="--fields lists all"):
        RECIPES[recipe]("i", "t", "o", banana=1)


# -- before a run begins ----------------------------------------------------------------------------------------------


def test_a_learning_rate_that_would_not_fall_is_refused_in_a_new_run(tmp_path: Path) -> None:
    low = paper("i", "t", str(tmp_path), lr=1e-5)
    with pytest.raises(TrainingError) as caught:
        require_startable(low)
    assert caught.value.what == "min_lr (4e-05) must not be above lr (1e-05), its peak"
    assert caught.value.remedy == "give --set min_lr=5e-07"
    with pytest.raises(TrainingError, match=r"min_lr \(4e-05\), warmup_lr \(4e-06\) must not"):
        require_startable(replace(low, lr=1e-6))
    require_startable(replace(low, min_lr=5e-07))
    require_startable(replace(low, lr=1e-6, min_lr=0.0, warmup_epochs=0))
    (tmp_path / "run.json").write_text("{}")
    require_startable(low)


def test_inputs_that_are_drawn_from_must_be_given() -> None:
    for changes, what in (
        ({"text_mix": TextMix(random=0.5, selected=0.5)}, "selected texts need --selection or --pairs"),
        ({"text_mix": TextMix(random=0.5, retrieved=0.5)}, "retrieved texts need --pairs"),
        ({"loss": LossConfig(contrastive=1)}, "the contrastive loss needs --captions or --pairs"),
    ):
        with pytest.raises(TrainingError, match=what):
            require_startable(config(**changes))
    require_startable(config(text_mix=TextMix(random=0.5, selected=0.5), loss=LossConfig(vl=0)))


def test_inputs_that_no_loss_uses_are_named() -> None:
    assert notes_on_inputs(config()) == []
    (note,) = notes_on_inputs(sample_paper("i", "TEXTS", "o", selection="SEL", loss=LossConfig(vl=0, pvl=1)))
    assert note.startswith("not used: the text mix selected=1, the selection SEL, the sentences of TEXTS: the vl loss")
    assert "--loss vl=..." in note
    (note,) = notes_on_inputs(
        config(loss=LossConfig(vl=0), pairs="PAIRS", text_mix=TextMix(random=0, retrieved=1), val=("set",))
    )
    assert note.startswith("not used: the text mix retrieved=1, the pairs PAIRS: ")
    assert notes_on_inputs(sample("i", "t", "o", val=("set",))) == []  # its prompts are looked up in the texts
    assert notes_on_inputs(sample("i", "t", "o", text_student="x")) == []
    (note,) = notes_on_inputs(sample("i", "t", "o", val=("set",), val_texts="p"))
    assert note.startswith("not used: the sentences of t: ")


def test_a_note_on_a_vision_transformer_at_the_rate_of_a_resnet() -> None:
    (note,) = notes_on_rate(best("i", None, "o", student="vit_small_patch16_224"))
    assert note == "at lr 0.02 Muon teaches a vision transformer less than at 0.003, which --recipe best-vit has"
    assert notes_on_rate(best("i", None, "o")) == notes_on_rate(best_vit("i", None, "o")) == []
    assert notes_on_rate(best("i", None, "o", student="ViT-B-32", optimizer="adamw")) == []


def test_a_run_that_ends_within_its_warm_up_is_named() -> None:
    (note,) = notes_on_length(config(max_steps=30), 30, 10)
    assert note.startswith("the run ends within its warm-up, which takes 40 steps (warmup_epochs=4): after 30 steps")
    assert "the learning rate is 0.00058, not 0.0008" in note
    assert "--set warmup_epochs=0.15" in note
    assert notes_on_length(config(warmup_epochs=0.15), 30, 10) == []
    assert notes_on_length(config(), 41, 10) == []
    assert notes_on_length(config(warmup_epochs=0), 1, 10) == []


def test_a_validation_that_is_never_due_is_named() -> None:
    known = config(val=("set",), val_every=3, warmup_epochs=0)
    (note,) = notes_on_length(known, 20, 10)
    assert "validated once, at the end: a validation is due every 30 steps (--val-every 3), and the run has 20" in note
    assert notes_on_length(known, 30, 10) == []
    assert notes_on_length(replace(known, val=()), 20, 10) == []


def test_a_field_that_cannot_change_is_told_from_one_that_does_not_exist() -> None:
    require_changeable(("lr", "epochs"))
    with pytest.raises(TrainingError, match=r"no field is called 'epoch'\n  remedy: did you mean 'epochs'"):
        require_changeable(("epoch",))
    with pytest.raises(TrainingError, match="no field is called 'banana'\n  remedy: dimefm train-student --fields"):
        require_changeable(("banana",))
    with pytest.raises(TrainingError, match="student, batch_size cannot change within a run"):
        require_changeable(("lr", "student", "batch_size"))


def test_of_a_loss_only_the_parts_that_differ_are_named() -> None:
    before, after = config(), config(loss=LossConfig(vl=1.0, pvl=0.0), lr=1.0)
    assert before.differences(after) == {"loss": "vl=0.7,pvl=0.3 != vl=1.0,pvl=0.0", "lr": "0.0008 != 1.0"}
    assert before.differences(before) == {}


def test_one_step_is_a_step() -> None:
    assert "after 1 step the learning rate is" in notes_on_length(config(), steps=1, steps_per_epoch=10)[0]
