"""Facts about how weights were trained that a file of weights does not contain: the preprocessing of images, and the
activation.

For a file, open_clip silently takes OpenAI's preprocessing and the activation of the architecture. Here the facts come
from the user, from a document that has them, or from the tags that open_clip knows for the architecture, if these
agree; else the user is asked. A wrong mean, or GELU for QuickGELU, costs accuracy and raises nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg

from cache_schemas import TeacherIdentity
from dimefm.errors import TeacherError
from dimefm.models.hub import preprocess_config
from dimefm.models.trained import Trained, option_of, shown

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
"""What decides the pixels of an image, besides the size, which belongs to the architecture."""

_OPENAI = {field: getattr(PreprocessCfg(), field) for field in PREPROCESSING}
_REQUIRED_OF_CONFIGS = ("mean", "std")  # many configs leave out the rest, for which open_clip has defaults
_ACTIVATIONS = {"gelu": "GELU", "quick_gelu": "QuickGELU"}
_QUICK = "-quickgelu"


@dataclass(frozen=True)
class Facts:
    """What to use where open_clip would guess: the fields of `preprocessing` that it would not know; and their
    `origin`, in words."""

    preprocessing: dict[str, Any]
    origin: str | None


def facts_of_weights(name: str, pretrained: str, given: Trained, known: TeacherIdentity | None = None) -> Facts:
    """The facts about the weights `pretrained`, a tag or a file, of the architecture `name`. What the user has not
    `given` comes from `known`, a document's identity of the same file.

    Raises TeacherError for a fact that neither of them gives if the tags of `name` do not agree on it, or there are
    none; for an activation that the architecture does not have; and for anything that the user gives beside a tag.
    """
    if open_clip.get_pretrained_cfg(name, pretrained):
        _require_none_given(given.fields(), f"the tag {pretrained} of {name}")
        return Facts({}, f"the tag {pretrained}")
    if open_clip.get_model_config(name) is None or not Path(pretrained).is_file():
        return Facts({}, None)  # loading it will fail, and say why
    tags = tags_of(name)
    values, origin = _first_known({}, given, known, agreeing_fields(tags.values()), f"{_count(tags)} of {name}")
    lacking = [field for field in PREPROCESSING if field not in values]
    missing = [_missing_preprocessing(lacking, _why(name, tags, lacking))] if lacking else []
    missing += _missing_activation(name, pretrained, given.activation or (known.activation if known else None), tags)
    if missing:
        raise _missing_error(pretrained, missing)
    return Facts(values, origin)


def facts_of_config(name: str, given: Trained, known: TeacherIdentity | None = None) -> Facts:
    """The same for a folder (``local-dir:``) or a repository (``hf-hub:``), whose config should have the facts."""
    raw = {field: value for field, value in preprocess_config(name).items() if field in PREPROCESSING and value}
    config = {field: tuple(value) if isinstance(value, list) else value for field, value in raw.items()}
    lacking = [field for field in _REQUIRED_OF_CONFIGS if field not in config]
    allowed = {*(set(PREPROCESSING) - config.keys()), *(["assume_openai"] if lacking else [])}
    _require_none_given({name: value for name, value in given.fields().items() if name not in allowed}, "its config")
    if not lacking and not given.fields():
        return Facts({}, "its config")
    values, origin = _first_known(
        config, given, known, {field: _OPENAI[field] for field in PREPROCESSING[2:]}, "open_clip's default"
    )
    lacking = [field for field in lacking if field not in values]
    if lacking:
        raise _missing_error(name, [_missing_preprocessing(lacking, f": its config has no {' and no '.join(lacking)}")])
    return Facts(values, origin)


def other_activation(name: str) -> str | None:
    """The architecture that differs from `name` in its activation alone, if open_clip has one."""
    other = name.removesuffix(_QUICK) if name.endswith(_QUICK) else name + _QUICK
    return other if other in open_clip.list_models() else None


def tags_of(name: str) -> dict[str, dict[str, Any]]:
    """What open_clip knows about the weights that it has for an architecture, by tag. If no architecture has the
    activation that it names for them, they were trained with that of this architecture."""
    cfgs = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    if cfgs and not other_activation(name):
        own = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
        return {tag: {**cfg, "quick_gelu": own} for tag, cfg in cfgs.items()}
    return cfgs


def agreeing_fields(cfgs: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of PREPROCESSING that have the same value in all of one or more configs."""
    first, *others = cfgs or [{}]
    same = [f for f in PREPROCESSING if f in first and all(cfg.get(f) == first[f] for cfg in others)]
    return {field: first[field] for field in same}


def _first_known(
    config: dict[str, Any], given: Trained, known: TeacherIdentity | None, rest: dict[str, Any], rest_from: str
) -> tuple[dict[str, Any], str | None]:
    """Each field from the first source that has it, and which source that was."""
    sources: list[tuple[str | None, dict[str, Any]]] = [
        ("its config", config),
        ("the user", given.fields()),
        ("assumed to be OpenAI's", _OPENAI if given.assume_openai else {}),
        (known.preprocessing_from, asdict(known.preprocessing)) if known else (None, {}),
        (rest_from, rest),
    ]
    found: dict[str, Any] = {}
    origins: list[tuple[str | None, list[str]]] = []
    for who, values in sources:
        mine = {field: values[field] for field in PREPROCESSING if field in values and field not in found}
        found |= mine
        origins += [(who, list(mine))] if mine else []
    if len(origins) == 1:
        return found, origins[0][0]
    return found, "; ".join(f"{who or 'not recorded'} ({', '.join(fields)})" for who, fields in origins)


def _require_none_given(given: dict[str, Any], where: str) -> None:
    """Raises TeacherError if the user gives anything that is known already."""
    if given:
        what = f"{', '.join(map(option_of, given))}: {where} says that itself"
        raise TeacherError(what, remedy="leave it out; it is for weights that are given as a file")


def _missing_activation(
    name: str, file: str, given: str | None, tags: dict[str, dict[str, Any]]
) -> list[tuple[str, str]]:
    """What is missing, and how to give it, if known weights for the architecture were trained with another activation
    than it has, and another architecture has that one. Empty otherwise.

    Raises TeacherError if the user names an activation that the architecture does not have.
    """
    has = "quick_gelu" if open_clip.get_model_config(name).get("quick_gelu", False) else "gelu"
    other = other_activation(name)
    if given and given != has:
        what = f"{file} was trained with {_ACTIVATIONS[given]}, which {name} does not use"
        raise TeacherError(what, remedy=f"name {other}" if other else "name an architecture that does")
    theirs = "gelu" if has == "quick_gelu" else "quick_gelu"
    differ = [tag for tag, cfg in tags.items() if bool(cfg.get("quick_gelu", False)) == (theirs == "quick_gelu")]
    if given or not differ:
        return []
    what = (
        f"its activation: {name} has {_ACTIVATIONS[has]}, known weights also {_ACTIVATIONS[theirs]} ({_some(differ)})"
    )
    return [(what, f"--activation {has} if that is right, or name {other}")]


def _missing_preprocessing(fields: list[str], why: str) -> tuple[str, str]:
    """That these fields are missing, and how to give them."""
    options = " ".join(f"{option_of(field)} {'R,G,B' if field in _REQUIRED_OF_CONFIGS else 'NAME'}" for field in fields)
    openai = ", ".join(f"{field} {shown(_OPENAI[field])}" for field in PREPROCESSING)
    return f"how images were prepared when it was trained{why}", f"{options}, or --assume-openai ({openai})"


def _missing_error(weights: str, missing: list[tuple[str, str]]) -> TeacherError:
    what, remedies = zip(*missing, strict=True)
    return TeacherError(f"{weights} does not say {'; nor '.join(what)}", remedy=f"give {'; and '.join(remedies)}")


def _why(name: str, tags: dict[str, dict[str, Any]], fields: list[str]) -> str:
    """Why these fields do not follow from the tags: which tag has which value."""
    if not tags:
        return f", and open_clip has no weights of {name} to compare with"
    differences = []
    for field in fields:
        values: dict[str, list[str]] = {}
        for tag, cfg in tags.items():
            values.setdefault(shown(cfg[field]), []).append(tag)
        differences.append(f"{field} " + " or ".join(f"{value} ({_some(names)})" for value, names in values.items()))
    return f", and known weights differ: {', '.join(differences)}"


def _count(tags: dict[str, Any]) -> str:
    return "the only tag" if len(tags) == 1 else f"all {len(tags)} tags"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
