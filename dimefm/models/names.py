"""Names of models and of their weights: which there are, and what a mistyped one was meant to be.

open_clip takes seconds to import, and timm as long. So before they are imported, names are read from their files.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from cache_schemas.run import CONFIG_FILE, RUN_FILE
from dimefm.errors import TeacherError, TrainingError
from dimefm.models.exported import format_of
from dimefm.system.near_names import did_you_mean, did_you_mean_path

FOLDER, HUB, TIMM = "local-dir:", "hf-hub:", "timm:"
CONFIGURED = (FOLDER, HUB)
"""How names begin that bring a config with them: a folder, a repository of the Hub."""

_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
_ALL = "docs/architectures.md lists all names"


def require_model(name: str, pretrained: str | None, *, folder: str = FOLDER) -> None:
    """Raises TeacherError unless `name` is a folder with an open_clip config, a repository of the Hub, an architecture
    of open_clip with weights `pretrained`, a tag or a file, or a model of timm. How the name of a folder begins is
    `folder`.
    """
    if name.startswith(TIMM):
        _require_timm(name.removeprefix(TIMM), pretrained)
    elif name.startswith(FOLDER):
        _require_config(name.removeprefix(FOLDER))
    elif not name.startswith(HUB):
        if not pretrained and Path(name).is_dir():
            if format_of(name):
                raise TeacherError(f"{name} is a folder", remedy=f"name it {FOLDER}{name}")
            raise TeacherError(f"{name} is a folder without a model", remedy=_instead_of(name))
        plain = name.replace("/", "-")  # OpenAI writes ViT-B/32, and open_clip takes that
        if plain not in architectures():
            what = f"{name} is neither a folder nor an architecture of open_clip"
            raise TeacherError(what, remedy=_meant(name, folder))
        _require_weights(plain, pretrained)


def require_any_model(name: str, pretrained: str | None) -> None:
    """Raises TeacherError unless `name` is a run, a folder with a model of any format, or as `require_model` has it."""
    if not Path(name, RUN_FILE).exists() and not format_of(name.removeprefix(FOLDER)):
        require_model(name, pretrained, folder="")


def require_student(name: str | None, text_name: str | None) -> None:
    """Raises TrainingError unless `name` is a model of open_clip or timm or a file with a config of open_clip, and
    `text_name` a model of open_clip."""
    if name is not None and is_config_file(name):
        read_config_file(name)
    elif name is not None and name not in architectures() and name.partition(".")[0] not in timm_names():
        raise unknown_student(name)
    if text_name is not None and text_name not in architectures():
        raise unknown_text_student(text_name)


def is_config_file(name: str) -> bool:
    """Whether an architecture is named by a file, and not by its name in open_clip or timm."""
    return name.endswith(".json")


def read_config_file(path: str) -> dict[str, Any]:
    """The config of an architecture in a file, as open_clip's own files have it, or as the open_clip_config.json of a
    folder has it. Raises TrainingError for a file that is not there, or has no image tower."""
    try:
        document = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        near = did_you_mean_path(path, "check the path")
        raise TrainingError(f"cannot read the student {path}: {error.strerror}", remedy=near) from error
    except ValueError as error:
        raise TrainingError(f"{path} is not JSON: {error}", remedy="give a model config of open_clip") from error
    config = document.get("model_cfg", document) if isinstance(document, dict) else {}
    if not isinstance(config, dict) or not isinstance(config.get("vision_cfg"), dict):
        remedy = "give a model config of open_clip; docs/training.md has an example"
        raise TrainingError(f"{path} has no vision_cfg", remedy=remedy)
    return {"text_cfg": {}, "embed_dim": None, **config}


def unknown_student(name: str) -> TrainingError:
    """The error for an image tower that neither open_clip nor timm has."""
    listed = f"{_ALL} of open_clip, timm.list_models() those of timm"
    remedy = did_you_mean(name, [*architectures(), *sorted(timm_names())], listed)
    return TrainingError(f"no image tower is called {name!r} in open_clip or timm", remedy=remedy)


def unknown_text_student(name: str) -> TrainingError:
    """The error for a text tower that open_clip does not have."""
    return TrainingError(f"no model of open_clip is called {name!r}", remedy=did_you_mean(name, architectures(), _ALL))


def unknown_tag(name: str, tag: str, give: str = "give") -> str:
    """A remedy for weights that are neither a file nor a tag of the architecture `name`; it begins with `give`."""
    known = tags(name)
    if not known:
        return f"{give} a file: open_clip has no weights of {name}"
    if len(known) <= 3:
        return f"{give} a file, or one of its tags: {', '.join(known)}"
    near = did_you_mean(tag, known, f"{give} a tag such as {known[0]}, or a file")
    return f"{near} (open_clip.list_pretrained_tags_by_model({name!r}) lists all {len(known)} tags)"


def architectures() -> list[str]:
    """The names of open_clip's models."""
    if "open_clip" in sys.modules:  # models may have been added to it
        return list(sys.modules["open_clip"].list_models())
    return sorted(path.stem for path in _package("open_clip").glob("model_configs/*.json"))


def tags(name: str) -> list[str]:
    """The tags of the weights that open_clip knows for an architecture."""
    if "open_clip" in sys.modules:
        return list(sys.modules["open_clip"].list_pretrained_tags_by_model(name))
    return _tags().get(name, [])


@lru_cache
def timm_names() -> frozenset[str]:
    """The names of timm's models, also of those that have been renamed."""
    sources = [path.read_text(encoding="utf-8") for path in _package("timm").glob("models/*.py")]
    names = {name for text in sources for name in re.findall(r"^@register_model\b.*\ndef (\w+)", text, re.MULTILINE)}
    renamed = [
        block for text in sources for block in re.findall(r"^register_model_deprecations\(.*?^}", text, re.M | re.S)
    ]
    return frozenset(names.union(*(re.findall(r"'(\w+)' ?:", block) for block in renamed)))


@lru_cache
def _tags() -> dict[str, list[str]]:
    """The tags by architecture, from the source of open_clip."""
    tree = ast.parse((_package("open_clip") / "pretrained.py").read_text(encoding="utf-8"))
    values = {ast.unparse(one.targets[0]): one.value for one in tree.body if isinstance(one, ast.Assign)}
    found = {}
    for name, value in _items(values.get("_PRETRAINED")):
        weights = _items(values.get(ast.unparse(value), value))
        found[name] = [tag for tag, _ in weights]
        quick = [tag for tag, cfg in weights if "quick_gelu=True" in ast.unparse(cfg)]
        found |= {f"{name}-quickgelu": quick} if quick else {}
    return found


def _items(node: ast.expr | None) -> list[tuple[str, ast.expr]]:
    """The entries of `{"a": b}` or of `dict(a=b)`."""
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        return [(str(key), value) for key, value in zip(keys, node.values, strict=True) if key is not None]
    if isinstance(node, ast.Call):
        return [(str(one.arg), one.value) for one in node.keywords]
    return []


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # imports nothing
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _require_config(folder: str) -> None:
    if not Path(folder).is_dir():
        remedy = did_you_mean_path(folder, "check the path", FOLDER)
        raise TeacherError(f"cannot load {FOLDER}{folder}: there is no such folder", remedy=remedy)
    if format_of(folder) is None:
        raise TeacherError(f"cannot load {FOLDER}{folder}: it has no {CONFIG_FILE}", remedy=_instead_of(folder))


def _require_timm(name: str, pretrained: str | None) -> None:
    """The same for the model of timm that is called `name` there."""
    if name.startswith(FOLDER) and not Path(name.removeprefix(FOLDER), "config.json").is_file():
        raise TeacherError(f"cannot load {TIMM}{name}: there is no config.json of timm", remedy="check the path")
    if not name.startswith(CONFIGURED) and name.partition(".")[0] not in timm_names():
        near = did_you_mean(name, sorted(timm_names()), "timm.list_models() lists all")
        raise TeacherError(f"no model of timm is called {name!r}", remedy=near)
    if pretrained and not Path(pretrained).is_file():
        what = f"cannot load {TIMM}{name}: there is no file {pretrained}"
        near = did_you_mean_path(
            pretrained, f"give a file; a tag of timm stands in the name, as {TIMM}resnet18.a1_in1k"
        )
        raise TeacherError(what, remedy=near)


def _require_weights(name: str, pretrained: str | None) -> None:
    if not pretrained:
        raise TeacherError(f"no weights named for {name}", remedy=unknown_tag(name, "", "give --pretrained with"))
    if pretrained.lower().replace("-", "_") not in tags(name) and not Path(pretrained).is_file():
        what = f"cannot load {name}: {pretrained} is neither a file nor a tag of its weights"
        near = did_you_mean_path(pretrained) if pretrained.endswith(_WEIGHTS) else ""
        raise TeacherError(what, remedy=near or unknown_tag(name, pretrained))


def _instead_of(folder: str) -> str:
    """A remedy for a folder that holds no model."""
    if Path(folder, RUN_FILE).is_file():
        return f"it is a run: dimefm export {folder} --out STUDENT makes a model of it"
    return "give a folder that open_clip or dimefm export wrote"


def _meant(name: str, folder: str) -> str:
    """A remedy for a name that no architecture has: a near one, a folder, a repository of the Hub."""
    if name.startswith("hf_hub:"):
        return f"name it {HUB}{name.partition(':')[2]}"
    near = did_you_mean(name, architectures()) or did_you_mean_path(name, begin=folder)
    if not near and name.count("/") == 1 and not Path(name).parent.exists():
        return f"if it is a repository of the Hub, name it {HUB}{name}"
    return near or f"check the name or the path; {_ALL}"
