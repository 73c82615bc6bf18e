"""The student: any image tower of open_clip or timm, and any text tower of open_clip, projected to the teacher's
embedding width.

Shapes: B images or sentences, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_text_tower, _build_vision_tower

from cache_schemas import Preprocessing, StudentSpec, TeacherIdentity
from cache_schemas.run import TextSpec
from dimefm.errors import TrainingError
from dimefm.models.hub import require_plain_tokenizer
from dimefm.models.names import is_config_file, read_config_file, unknown_student, unknown_text_student
from dimefm.models.tokenizer import fast_tokenizer, open_tokenizer


def student_spec(
    name: str, teacher: TeacherIdentity, image_size: int | None = None, *, embed_dim: int | None = None
) -> StudentSpec:
    """The image tower of the open_clip model (``ViT-B-32``) or timm model (``resnet18``) called `name`, or of the
    open_clip config in the file ``NAME.json``.

    `image_size` in pixels replaces the model's own, `embed_dim` the teacher's width. Raises TrainingError for a name
    that neither library knows, for a file without a config, and for a size that the tower cannot take.
    """
    width = embed_dim or teacher.embed_dim
    cfg = _config_of(name, width)
    if cfg is not None:
        vision_cfg: dict[str, Any] = _without_captions(cfg["vision_cfg"])
        if "timm_model_name" in vision_cfg:
            vision_cfg["timm_model_pretrained"] = False
    elif timm.is_model(name):
        vision_cfg = _timm_config(name, image_size)
    else:
        raise unknown_student(name)
    if image_size is not None:
        vision_cfg["image_size"] = image_size
    size = vision_cfg.get("image_size", 224)
    return StudentSpec(
        name=Path(name).stem if is_config_file(name) else name,
        vision_cfg=vision_cfg,
        embed_dim=width,
        image_size=size[0] if isinstance(size, (list, tuple)) else size,
        mean=teacher.preprocessing.mean,
        std=teacher.preprocessing.std,
        activation=teacher.activation,
        resize_mode="squash" if teacher.preprocessing.resize_mode == "squash" else "shortest",
    )


def _without_captions(tower_cfg: dict[str, Any]) -> dict[str, Any]:
    """The config of a tower that returns its embedding only, and not also tokens for the decoder of a CoCa."""
    return {name: value for name, value in tower_cfg.items() if name != "output_tokens"}


def notes_on_preparation(spec: StudentSpec, teachers: Sequence[TeacherIdentity]) -> list[str]:
    """Notes for the user where a student's images are prepared in another way than its first teacher's; and where it
    will not fit beside the text tower of another."""
    theirs, notes = teachers[0].preprocessing, []
    for field in ("mean", "std"):
        if getattr(spec, field) != getattr(theirs, field):
            value = getattr(spec, field)
            notes.append(f"the student's {field} is {value}, that of its first weights and not its teacher's")
    if spec.resize_mode != theirs.resize_mode:
        what = f"is evaluated on images resized by {spec.resize_mode}, its teacher's by {theirs.resize_mode}"
        why = "crops have no borders" if theirs.resize_mode == "longest" else "the run was begun so"
        notes.append(f"the student {what}: {why}")
    for one in teachers[1:]:
        if one.has_text and one.activation != spec.activation and has_activation(spec):
            what = f"has {one.activation} and the student {spec.activation}: open_clip has one for both towers"
            notes.append(f"the student cannot be exported with the text tower of {one.name}, which {what}")
    return notes


def has_activation(spec: StudentSpec) -> bool:
    """Whether open_clip can choose the activation of the image tower: towers of timm, and ResNets, have their own."""
    return "timm_model_name" not in spec.vision_cfg and not isinstance(spec.vision_cfg.get("layers"), (list, tuple))


def _timm_config(name: str, image_size: int | None) -> dict[str, Any]:
    facts = timm.get_pretrained_cfg(name)
    size = facts.input_size[-1] if facts is not None else 224
    if facts is not None and facts.fixed_input_size and image_size not in (None, size):
        what = f"{name} takes only images of {size} px: open_clip builds timm towers at their own size"
        raise TrainingError(what, remedy=f"give --image-size {size}, a convolutional timm model, or an open_clip ViT")
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": size,
    }


def _config_of(name: str, width: int) -> dict[str, Any] | None:
    """open_clip's config of a model, None for an unknown name. A tower without a projection, as SigLIP has, is given
    one if its width is another."""
    cfg: dict[str, Any] | None = read_config_file(name) if is_config_file(name) else open_clip.get_model_config(name)
    if cfg is not None and cfg["embed_dim"] != width:
        for tower, field in (("vision_cfg", "timm_proj"), ("text_cfg", "proj_type")):
            if cfg[tower].get(field) == "none":
                cfg[tower][field] = "linear"
    return cfg


def build_student(spec: StudentSpec) -> Any:
    """The tower with random weights, images float32 (B, 3, size, size) to features (B, D), not normalised.

    It is built by open_clip's own function, so that an exported folder gives the same module.
    """
    try:
        tower = _build_vision_tower(spec.embed_dim, dict(spec.vision_cfg), spec.activation == "quick_gelu").eval()
        with torch.no_grad():  # for some towers of timm, open_clip's projection expects another width
            features_1D = tower(torch.zeros(1, 3, spec.image_size, spec.image_size))
        if not isinstance(features_1D, torch.Tensor) or features_1D.shape != (1, spec.embed_dim):
            raise ValueError(f"it does not give one embedding of width {spec.embed_dim} per image")
        return tower.train()
    except MemoryError:
        raise
    except Exception as error:  # towers of two libraries, which check their sizes in many ways or not at all
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = f"give {_fitting_sizes(spec)}another --student, such as ViT-S-32 or resnet18"
        raise TrainingError(f"cannot build {spec.name} at {spec.image_size} px: {reason}", remedy=remedy) from error


def widened(tower: Any, spec: StudentSpec) -> Any:
    """The tower of `spec` with the weights of `tower`, whose projection is narrower: they are the first columns of the
    wide one. Its other columns are random. Raises TrainingError for a tower in which that is not all that differs."""
    wide = build_student(spec)
    state = wide.state_dict()
    for name, value in tower.state_dict().items():
        dim = _dim_of_width(spec, name, state, value)
        part = state[name] if dim is None else state[name].narrow(dim, 0, value.shape[dim])
        part.copy_(value)
    return wide


def of_columns(weights: dict[str, torch.Tensor], spec: StudentSpec, start: int, width: int) -> dict[str, torch.Tensor]:
    """Of the weights of the tower of `spec`, those of the tower that gives only `width` columns of its features, from
    the column `start` on. Raises as `widened` does."""
    found = {}
    for name, value in build_student(replace(spec, embed_dim=width)).state_dict().items():
        dim = _dim_of_width(spec, name, weights, value)
        found[name] = weights[name] if dim is None else weights[name].narrow(dim, start, width).clone()
    return found


def _dim_of_width(spec: StudentSpec, name: str, wide: dict[str, torch.Tensor], narrow: torch.Tensor) -> int | None:
    """The dimension along which a tensor of a projection is as long as the tower is wide; None for any other tensor."""
    whole = wide[name].shape if name in wide else torch.Size()
    if whole == narrow.shape:
        return None
    differ = [dim for dim, (more, less) in enumerate(zip(whole, narrow.shape, strict=False)) if more != less]
    if len(whole) != narrow.ndim or len(differ) != 1 or whole[differ[0]] != spec.embed_dim:
        what = f"{spec.name} does not end in one linear projection: {name} cannot be divided between several teachers"
        raise TrainingError(what, remedy="give another --student, such as ViT-B-32 or resnet18")
    return differ[0]


class Columns(torch.nn.Module):
    """A tower that gives the first `width` columns of another one's features."""

    def __init__(self, tower: Any, width: int) -> None:
        super().__init__()
        self.tower, self._width = tower, width
        self.train(tower.training)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to the first columns (B, width)."""
        return self.tower(inputs)[:, : self._width]  # type: ignore[no-any-return]


def _fitting_sizes(spec: StudentSpec) -> str:
    """The sizes that a tower can be expected to take, as a remedy; nothing where it is built at its own size."""
    cfg: dict[str, Any] = (open_clip.get_model_config(spec.name) or {}).get("vision_cfg", {})
    facts = timm.get_pretrained_cfg(spec.name) if not cfg and timm.is_model(spec.name) else None
    own = facts.input_size[-1] if facts is not None else cfg.get("image_size", 224)
    if spec.image_size == own:
        return ""
    if isinstance(cfg.get("layers"), int) and "timm_model_name" not in cfg:
        patch = cfg.get("patch_size", 16)
        return f"an --image-size that is a multiple of its patch of {patch} px, such as {own}, or "
    return f"an --image-size nearer to its own, which is {own}, or "


def text_spec(name: str, teacher: TeacherIdentity) -> TextSpec:
    """The text tower of the open_clip model `name`. Raises TrainingError for a name that open_clip does not know."""
    cfg = _config_of(name, teacher.embed_dim)
    if cfg is None:
        raise unknown_text_student(name)
    return TextSpec(
        name=name,
        text_cfg=_without_captions(cfg["text_cfg"]),
        embed_dim=teacher.embed_dim,
        activation=teacher.activation,
    )


def build_text_student(spec: TextSpec) -> Any:
    """The text tower with random weights, tokens int64 (B, L) to features (B, D), not normalised."""
    try:
        return _build_text_tower(spec.embed_dim, dict(spec.text_cfg), spec.activation == "quick_gelu")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TrainingError(f"cannot build the text tower of {spec.name}: {reason}") from error


def tokenizer_of(spec: TextSpec) -> Any:
    """The tokenizer of the exported student: sentences to tokens int64 (B, L)."""
    require_plain_tokenizer(spec.name, open_clip.get_model_config(spec.name) or {})
    return fast_tokenizer(open_tokenizer(spec.name))


def has_convolutions(tower: torch.nn.Module) -> bool:
    """Whether a tower has more convolutions than the one of a patch embedding: then channels-last is faster."""
    return sum(isinstance(m, torch.nn.Conv2d) for m in tower.modules()) > 1


def student_preprocessing(spec: StudentSpec) -> Preprocessing:
    """How a student's images are prepared for evaluation, and what is written into its exported folder."""
    return Preprocessing(
        size=(spec.image_size, spec.image_size),
        mean=spec.mean,
        std=spec.std,
        interpolation="bicubic",
        resize_mode=spec.resize_mode,
    )
