"""The student: any image tower of open_clip or timm, and any text tower of open_clip, projected to the teacher's
embedding width.

Shapes: B images or sentences, L tokens, D embedding width.
"""

from __future__ import annotations

from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_text_tower, _build_vision_tower

from cache_schemas import Preprocessing, StudentSpec, TeacherIdentity
from cache_schemas.run import TextSpec
from dimefm.errors import TrainingError
from dimefm.models.hub import require_plain_tokenizer
from dimefm.models.names import unknown_student, unknown_text_student
from dimefm.models.tokenizer import fast_tokenizer, open_tokenizer


def student_spec(name: str, teacher: TeacherIdentity, image_size: int | None = None) -> StudentSpec:
    """The image tower of the open_clip model (``ViT-B-32``) or timm model (``resnet18``) called `name`.

    `image_size` in pixels replaces the model's own. Raises TrainingError for a name that neither library knows, and
    for a size that the tower cannot take.
    """
    cfg = _config_of(name, teacher)
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
        name=name,
        vision_cfg=vision_cfg,
        embed_dim=teacher.embed_dim,
        image_size=size[0] if isinstance(size, (list, tuple)) else size,
        mean=teacher.preprocessing.mean,
        std=teacher.preprocessing.std,
        activation=teacher.activation,
        resize_mode="squash" if teacher.preprocessing.resize_mode == "squash" else "shortest",
    )


def _without_captions(tower_cfg: dict[str, Any]) -> dict[str, Any]:
    """The config of a tower that returns its embedding only, and not also tokens for the decoder of a CoCa."""
    return {name: value for name, value in tower_cfg.items() if name != "output_tokens"}


def notes_on_preparation(spec: StudentSpec, teacher: TeacherIdentity) -> list[str]:
    """Notes for the user where a student's images are prepared in another way than its teacher's."""
    theirs, notes = teacher.preprocessing, []
    for field in ("mean", "std"):
        if getattr(spec, field) != getattr(theirs, field):
            value = getattr(spec, field)
            notes.append(f"the student's {field} is {value}, that of its first weights and not its teacher's")
    if spec.resize_mode != theirs.resize_mode:
        what = f"is evaluated on images resized by {spec.resize_mode}, its teacher's by {theirs.resize_mode}"
        why = "crops have no borders" if theirs.resize_mode == "longest" else "the run was begun so"
        notes.append(f"the student {what}: {why}")
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


def _config_of(name: str, teacher: TeacherIdentity) -> dict[str, Any] | None:
    """open_clip's config of a model, None for an unknown name. A tower without a projection, as SigLIP has, is given
    one if its width is not the teacher's."""
    cfg: dict[str, Any] | None = open_clip.get_model_config(name)
    if cfg is not None and cfg["embed_dim"] != teacher.embed_dim:
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
    cfg = _config_of(name, teacher)
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
