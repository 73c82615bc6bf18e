"""Converts a checkpoint of the authors of DIME-FM to an open_clip folder, with the teacher's text tower.

It may have two forms. Their training code saves OpenAI's image tower, ``visual.*`` with the projection ``visual.proj``.
Their evaluation code reads a tower of its own, ``image_encoder.*`` or ``visual.*``, with the projection beside it
(``image_projection`` or ``vision_projection``) and another epsilon in every LayerNorm. Both have QuickGELU.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cache_schemas import StudentSpec
from cache_schemas.run import CONFIG_FILE
from dimefm.errors import MismatchError, SourceError
from dimefm.models.clip import load_clip
from dimefm.models.open_clip_folder import beside_text_tower, publish_folder
from dimefm.models.towers import build_student
from dimefm.models.trained import Trained, checkpoint_file
from dimefm.system import storage
from dimefm.system.output_names import require_name, require_place

_STATES = ("image_state_dict", "model")
_PREFIXES = (("module.", ""), ("image_encoder.", "visual."), ("image_projection", "vision_projection"))
_UNUSED = "visual.head."
"""The classifier of a supervised pretraining, which the features do not pass through."""

_EPSILON = 1e-12  # in the form with the projection beside the tower; OpenAI's form has the default of PyTorch
_HEAD_WIDTH = 64
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_RELATIVE, _ABSOLUTE = 1e-2, 1e-4  # above the rounding of weights that once were bfloat16
_SHOWN = 3
_REMEDY = (
    "give a checkpoint of the authors' ViT: visual.* with visual.proj, or image_encoder.* (visual.*) with "
    "image_projection (vision_projection)"
)
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The result. `left_out` are the checkpoint's tensors that were not taken; `foreign` are those of them that the
    teacher's text tower also has, with other values."""

    out: str
    image: StudentSpec
    teacher: str
    left_out: tuple[str, ...]
    foreign: tuple[str, ...]

    def show(self) -> str:
        """A few lines for a person."""
        cfg: Any = self.image.vision_cfg
        epsilon = cfg.get("norm_kwargs", {"eps": 1e-5})["eps"]
        lines = [
            f"{self.out}: load it with open_clip as local-dir:{self.out}",
            f"  image tower  ViT of {cfg['layers']} layers, width {cfg['width']}, patches of {cfg['patch_size']} px, "
            f"images of {cfg['image_size']} px, projected to {self.image.embed_dim}; LayerNorm epsilon {epsilon:g}",
            f"  text tower   that of {self.teacher}; nothing of it is taken from the checkpoint",
        ]
        if self.left_out:
            lines.append(f"  left out     {len(self.left_out)} of the checkpoint's tensors: {_first(self.left_out)}")
        if self.foreign:
            what = f"{len(self.foreign)} of these differ from this teacher's: {_first(self.foreign)}"
            lines.append(f"  note         {what}; is it the teacher that the checkpoint was distilled from?")
        return "\n".join(lines)


def convert(
    checkpoint: str, out: str, *, teacher: str, pretrained: str | None = None, trained: Trained | None = None
) -> Converted:
    """Write the image tower of `checkpoint` with the text tower of `teacher` to `out`, as ``dimefm export`` would.

    The folder appears whole or not at all; if one with the same bytes is there, it is left as it is. Raises SourceError
    for a file that is not such a checkpoint, MismatchError for a teacher of another width or activation, TeacherError,
    OutputExistsError.
    """
    out = storage.local(out, "a converted checkpoint")
    require_name(out, "an open_clip folder")
    require_place(out, CONFIG_FILE)
    state = _read(checkpoint)
    spec, image = image_tower(checkpoint, state)
    clip = load_clip(teacher, pretrained, trained=trained, precision="fp32", device="cpu")
    named = " ".join(filter(None, (teacher, pretrained)))
    if clip.identity.embed_dim != spec.embed_dim:
        what = f"{checkpoint} projects images to {spec.embed_dim}, {named} texts to {clip.identity.embed_dim}"
        raise MismatchError(what, remedy="name the teacher that it was distilled from; the authors' is ViT-L/14")
    if clip.identity.activation != spec.activation:
        what = f"{checkpoint} has QuickGELU, {named} has GELU, and an open_clip folder one activation for both towers"
        raise MismatchError(what, remedy="the authors' teacher is --teacher ViT-L-14-quickgelu --pretrained openai")
    config, text = beside_text_tower(clip, spec)
    publish_folder(Path(out), config, {**text, **image}, clip.tokenizer)
    left_out = {name: value for name, value in state.items() if not _is_of_tower(name)}
    foreign = _foreign(left_out, text)
    return Converted(out=out, image=spec, teacher=named, left_out=tuple(left_out), foreign=tuple(foreign))


def image_tower(checkpoint: str, state: dict[str, torch.Tensor]) -> tuple[StudentSpec, dict[str, torch.Tensor]]:
    """The description of the image tower that these tensors make, and its weights: under open_clip's names, in float32.

    Raises SourceError if they are not a whole ViT in one of the two forms.
    """
    tower = {_inner(name): value for name, value in state.items() if _is_of_tower(name)}
    if any(name.startswith("layers.") for name in tower):
        what = f"{checkpoint} holds a Swin student ({_listed(_visual(tower))})"
        raise SourceError(f"{what}, a tower that open_clip does not have", remedy=_REMEDY)
    if "visual.proj" in state and "vision_projection" in state:
        raise SourceError(f"{checkpoint} holds two projections, visual.proj and vision_projection", remedy=_REMEDY)
    spec = _spec(checkpoint, tower, _EPSILON if "vision_projection" in state else None)
    with torch.device("meta"):
        wanted = build_student(spec).state_dict()
    problems = {
        "missing": wanted.keys() - tower.keys(),
        "unexpected": tower.keys() - wanted.keys(),
        "of another shape": {n for n in wanted.keys() & tower.keys() if wanted[n].shape != tower[n].shape},
    }
    if any(problems.values()):
        found = "; ".join(f"{kind} {_listed(_visual(sorted(names)))}" for kind, names in problems.items() if names)
        raise SourceError(f"{checkpoint} is not a whole ViT of {len(wanted)} tensors: {found}", remedy=_REMEDY)
    return spec, {f"visual.{name}": tower[name].float() for name in wanted}


def _spec(checkpoint: str, tower: dict[str, torch.Tensor], epsilon: float | None) -> StudentSpec:
    """The description of the tower that has these shapes."""
    sizes = {"conv1.weight": 4, "positional_embedding": 2, "transformer.resblocks.0.ln_1.weight": 1, "proj": 2}
    bad = [f"visual.{name}" for name, ndim in sizes.items() if name not in tower or tower[name].ndim != ndim]
    if bad:
        what = f"{', '.join(bad)} missing or of another shape; it holds {_listed(_visual(tower))}"
        raise SourceError(f"{checkpoint} is not a ViT of CLIP's form: {what}", remedy=_REMEDY)
    width, _, patch, _ = tower["conv1.weight"].shape
    patches = len(tower["positional_embedding"]) - 1
    grid = math.isqrt(max(patches, 0))
    if width % _HEAD_WIDTH or not grid or grid**2 != patches:
        what = f"width {width} and {patches} patches, not a multiple of {_HEAD_WIDTH} and the patches of a square"
        raise SourceError(f"{checkpoint} is not a ViT of CLIP's form: {what}", remedy=_REMEDY)
    vision_cfg: dict[str, object] = {
        "image_size": grid * patch,
        "layers": 1 + max(int(block[1]) for name in tower if (block := _BLOCK.match(name))),
        "width": width,
        "patch_size": patch,
    }
    return StudentSpec(
        name=f"the tower of {checkpoint}",
        vision_cfg=vision_cfg if epsilon is None else {**vision_cfg, "norm_kwargs": {"eps": epsilon}},
        embed_dim=tower["proj"].shape[1],
        image_size=grid * patch,
        mean=_MEAN,
        std=_STD,
        activation="quick_gelu",
    )


def _is_of_tower(name: str) -> bool:
    return name == "vision_projection" or (name.startswith("visual.") and not name.startswith(_UNUSED))


def _inner(name: str) -> str:
    """The name of a tensor within the image tower of open_clip."""
    return "proj" if name == "vision_projection" else name.removeprefix("visual.")


def _foreign(left_out: dict[str, torch.Tensor], text: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that the teacher's text tower also has, with other values."""
    mine = {name.removeprefix("text."): value for name, value in text.items() if not name.startswith("logit_")}
    pairs = {name: (value, mine.get(name.removeprefix("text."))) for name, value in left_out.items()}
    return [name for name, (value, other) in pairs.items() if other is not None and not _alike(value, other)]


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=_RELATIVE, atol=_ABSOLUTE)


def _read(checkpoint: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint. Their names are made the same for both forms."""
    content = _load(checkpoint)
    for key in _STATES:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            for old, new in _PREFIXES:
                name = new + name[len(old) :] if name.startswith(old) else name
            state[name] = value
    if not any(map(_is_of_tower, state)):
        held = f"its tensors are {_listed(list(state))}" if state else "it holds no tensors by name"
        raise SourceError(f"{checkpoint} holds no image tower: {held}", remedy=_REMEDY)
    return state


def _load(checkpoint: str) -> Any:
    """The content of a file of torch.save. Only tensors and plain values are ever unpickled."""
    path = checkpoint_file(checkpoint)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises a dozen kinds
        raise _unreadable(checkpoint, path, error) from None


def _unreadable(checkpoint: str, path: Path, error: Exception) -> SourceError:
    """Why torch could not read a file. Its own words are not shown: they advise to unpickle anything."""
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] != b"\x80" and start != b"PK":  # how old and new files of torch.save begin
        return SourceError(f"{checkpoint} is not a file of torch.save", remedy=_REMEDY)
    if type(error).__name__ == "UnpicklingError":
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{checkpoint} holds more than tensors ({name[1] if name else 'objects of Python'})"
        remedy = "if you trust it, load it yourself with weights_only=False and torch.save its state dict alone"
        return SourceError(f"{what}: reading it could run any code, so it is not read", remedy=remedy)
    reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
    return SourceError(f"{checkpoint} cannot be read: {reason}", remedy="give the file as torch.save wrote it, whole")


def _listed(names: Collection[str]) -> str:
    return f"{len(names)} ({_first(names)})"


def _first(names: Collection[str]) -> str:
    return ", ".join([*islice(names, _SHOWN), *(["..."] if len(names) > _SHOWN else [])])


def _visual(names: Iterable[str]) -> list[str]:
    return [f"visual.{name}" for name in names]
