"""What weights do not say of themselves: how images were prepared when they were trained, and their activation.

open_clip takes OpenAI's preprocessing and the activation of the architecture for a file of weights, and says nothing.
Here they come from the user, from a document that has them, or from the tags that open_clip knows for the architecture,
where these agree; else they are asked for. A wrong mean, or GELU for QuickGELU, costs accuracy and raises nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg

from cache_schemas import TeacherIdentity
from cache_schemas.identity import Activation, Interpolation, ResizeMode
from dimefm.errors import TeacherError
from dimefm.models.hub import preprocess_config

PREPARING = ("mean", "std", "interpolation", "resize_mode")
"""What decides an image's pixels beside the size, which is the architecture's."""

_OPENAI = {field: getattr(PreprocessCfg(), field) for field in PREPARING}
_IN_CONFIGS = ("mean", "std")  # the rest is open_clip's default where a config leaves it out, as many do
_ACTIVATIONS = {"gelu": "GELU", "quick_gelu": "QuickGELU"}
_QUICK = "-quickgelu"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the user says about weights in a file that do not say it themselves. None: nothing."""

    mean: tuple[float, float, float] | None = None
    """Mean colour, from 0 to 1, that weights in a file were trained with; needed where no known tag says it."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of colours that weights in a file were trained with; needed as `mean` is."""
    interpolation: Interpolation | None = None
    """How images were resized when weights in a file were trained; needed as `mean` is."""
    resize_mode: ResizeMode | None = None
    """Which side of images was resized when weights in a file were trained (squash: both); needed as `mean` is."""
    activation: Activation | None = None
    """Activation of weights in a file; needed where the known tags differ."""
    assume_openai: bool = False
    """Take OpenAI's preprocessing for weights in a file, as far as nothing else says it."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name) or ()
            if not all(0 <= value <= 1 for value in values) or (name == "std" and 0 in values):
                what = f"{_option(name)} {_shown(values)} is not of colours from 0 to 1"
                raise TeacherError(what, remedy="divide what is of colours from 0 to 255 by 255")

    def fields(self) -> dict[str, Any]:
        """What is said, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


@dataclass(frozen=True)
class Facts:
    """What holds for weights where open_clip would guess, `preprocessing` without the size; and in words, where it is
    from."""

    preprocessing: dict[str, Any]
    origin: str | None


def facts_of_weights(name: str, pretrained: str, said: Trained, known: TeacherIdentity | None = None) -> Facts:
    """What the weights `pretrained`, a tag or a file, of the architecture `name` were trained with. `known` is a
    document's identity of a file, for what the user does not say.

    Raises TeacherError where the tags of `name` do not agree, or there are none, and nobody has said it; for an
    activation that the architecture does not have; and for what is said of a tag.
    """
    if open_clip.get_pretrained_cfg(name, pretrained):
        _require_silence(said.fields(), f"the tag {pretrained} of {name}")
        return Facts({}, f"the tag {pretrained}")
    if open_clip.get_model_config(name) is None or not Path(pretrained).is_file():
        return Facts({}, None)  # it cannot be loaded either
    tags = tags_of(name)
    values, origin = _fill({}, said, known, agreeing_fields(tags.values()), f"{_count(tags)} of {name}")
    lacking = [field for field in PREPARING if field not in values]
    unsaid = [_preparing_unsaid(lacking, _why(name, tags, lacking))] if lacking else []
    unsaid += _activation_unsaid(name, pretrained, said.activation or (known.activation if known else None), tags)
    if unsaid:
        raise _unsaid(pretrained, unsaid)
    return Facts(values, origin)


def facts_of_config(name: str, said: Trained, known: TeacherIdentity | None = None) -> Facts:
    """The same of a folder (``local-dir:``) or a repository (``hf-hub:``), whose config should say it."""
    raw = {field: value for field, value in preprocess_config(name).items() if field in PREPARING and value}
    config = {field: tuple(value) if isinstance(value, list) else value for field, value in raw.items()}
    lacking = [field for field in _IN_CONFIGS if field not in config]
    allowed = {*(set(PREPARING) - config.keys()), *(["assume_openai"] if lacking else [])}
    _require_silence({name: value for name, value in said.fields().items() if name not in allowed}, "its config")
    if not lacking and not said.fields():
        return Facts({}, "its config")
    values, origin = _fill(
        config, said, known, {field: _OPENAI[field] for field in PREPARING[2:]}, "open_clip's default"
    )
    lacking = [field for field in lacking if field not in values]
    if lacking:
        raise _unsaid(name, [_preparing_unsaid(lacking, f": its config has no {' and no '.join(lacking)}")])
    return Facts(values, origin)


def other_activation(name: str) -> str | None:
    """The architecture that differs from `name` in its activation alone, if open_clip has one."""
    other = name.removesuffix(_QUICK) if name.endswith(_QUICK) else name + _QUICK
    return other if other in open_clip.list_models() else None


def tags_of(name: str) -> dict[str, dict[str, Any]]:
    """What open_clip knows of each of its weights of an architecture, by tag. If there is none for the activation that
    it has of them, they were trained with the architecture's own."""
    cfgs = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    if cfgs and not other_activation(name):
        own = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
        return {tag: {**cfg, "quick_gelu": own} for tag, cfg in cfgs.items()}
    return cfgs


def agreeing_fields(cfgs: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    """Each field of PREPARING that all of one or more have the same value of."""
    first, *others = cfgs or [{}]
    same = [f for f in PREPARING if f in first and all(cfg.get(f) == first[f] for cfg in others)]
    return {field: first[field] for field in same}


def _fill(
    config: dict[str, Any], said: Trained, known: TeacherIdentity | None, rest: dict[str, Any], rest_from: str
) -> tuple[dict[str, Any], str | None]:
    """Each field from the first that has it, and who has which."""
    sources: list[tuple[str | None, dict[str, Any]]] = [
        ("its config", config),
        ("the user", said.fields()),
        ("assumed to be OpenAI's", _OPENAI if said.assume_openai else {}),
        (known.preprocessing_from, asdict(known.preprocessing)) if known else (None, {}),
        (rest_from, rest),
    ]
    found: dict[str, Any] = {}
    origins: list[tuple[str | None, list[str]]] = []
    for who, values in sources:
        mine = {field: values[field] for field in PREPARING if field in values and field not in found}
        found |= mine
        origins += [(who, list(mine))] if mine else []
    if len(origins) == 1:
        return found, origins[0][0]
    return found, "; ".join(f"{who or 'not recorded'} ({', '.join(fields)})" for who, fields in origins)


def _require_silence(said: dict[str, Any], where: str) -> None:
    """Raises TeacherError for what is said though the weights bring it."""
    if said:
        what = f"{', '.join(map(_option, said))}: {where} says that itself"
        raise TeacherError(what, remedy="leave it out; it is for weights that are given as a file")


def _activation_unsaid(
    name: str, file: str, said: str | None, tags: dict[str, dict[str, Any]]
) -> list[tuple[str, str]]:
    """What is not said and how to say it, where weights that fit the architecture have been trained with another
    activation than it has, for which there is another architecture.

    Raises TeacherError where the architecture has not the one that is said.
    """
    has = "quick_gelu" if open_clip.get_model_config(name).get("quick_gelu", False) else "gelu"
    other = other_activation(name)
    if said and said != has:
        what = f"{file} was trained with {_ACTIVATIONS[said]}, which {name} does not use"
        raise TeacherError(what, remedy=f"name {other}" if other else "name an architecture that does")
    theirs = "gelu" if has == "quick_gelu" else "quick_gelu"
    differ = [tag for tag, cfg in tags.items() if bool(cfg.get("quick_gelu", False)) == (theirs == "quick_gelu")]
    if said or not differ:
        return []
    what = (
        f"its activation: {name} has {_ACTIVATIONS[has]}, known weights also {_ACTIVATIONS[theirs]} ({_some(differ)})"
    )
    return [(what, f"--activation {has} if that is right, or name {other}")]


def _preparing_unsaid(fields: list[str], why: str) -> tuple[str, str]:
    """That these fields are not said, and how to say them."""
    options = " ".join(f"{_option(field)} {'R,G,B' if field in _IN_CONFIGS else 'NAME'}" for field in fields)
    openai = ", ".join(f"{field} {_shown(_OPENAI[field])}" for field in PREPARING)
    return f"how images were prepared when it was trained{why}", f"{options}, or --assume-openai ({openai})"


def _unsaid(weights: str, unsaid: list[tuple[str, str]]) -> TeacherError:
    what, remedies = zip(*unsaid, strict=True)
    return TeacherError(f"{weights} does not say {'; nor '.join(what)}", remedy=f"give {'; and '.join(remedies)}")


def _why(name: str, tags: dict[str, dict[str, Any]], fields: list[str]) -> str:
    """Why these fields do not follow from the tags: which of them has which value."""
    if not tags:
        return f", and open_clip has no weights of {name} to compare with"
    differences = []
    for field in fields:
        values: dict[str, list[str]] = {}
        for tag, cfg in tags.items():
            values.setdefault(_shown(cfg[field]), []).append(tag)
        differences.append(f"{field} " + " or ".join(f"{value} ({_some(names)})" for value, names in values.items()))
    return f", and known weights differ: {', '.join(differences)}"


def _count(tags: dict[str, Any]) -> str:
    return "the only tag" if len(tags) == 1 else f"all {len(tags)} tags"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
