"""Models without a text tower as a Clip: vision-only teachers, which timm has, and students of them.

Shapes: B images, D embedding width, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from torch import nn

from cache_schemas import Preprocessing, TeacherIdentity
from cache_schemas.identity import Precision
from dimefm.errors import TeacherError
from dimefm.models.clip import Clip, digest_weights
from dimefm.models.names import FOLDER, TIMM
from dimefm.models.trained import Trained, option_of

_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


class VisionClip(Clip):
    """An image tower alone. Its identity has no tokenizer, and sentences are refused."""

    def __init__(
        self, model: Any, tokenizer: None, identity: TeacherIdentity, model_cfg: dict[str, Any], device: str
    ) -> None:
        super().__init__(model, tokenizer, identity, model_cfg, device)

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        self._refuse()

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        self._refuse()

    def text_digest(self) -> str:
        return ""

    def _refuse(self) -> NoReturn:
        what = f"{self.identity.name} has no text tower: it gives embeddings of images alone"
        raise TeacherError(what, remedy="give a CLIP model where sentences are needed")


class _Vision(nn.Module):
    """A tower, with open_clip's names of what it is and does."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return self.visual(pixels_B3HW)  # type: ignore[no-any-return]


def vision_clip(
    tower: Any,
    name: str,
    pretrained: str | None,
    preprocessing: Preprocessing,
    width: int,
    *,
    precision: Precision,
    device: str,
    preprocessing_from: str | None = None,
) -> VisionClip:
    """A tower from images float32 (B, 3, H, W) to features (B, width) as a Clip."""
    model = _Vision(tower)
    identity = TeacherIdentity(
        name=name,
        pretrained=pretrained,
        weights=digest_weights(model),
        activation="gelu",
        preprocessing=preprocessing,
        tokenizer="",
        context_length=0,
        embed_dim=width,
        precision=precision,
        logit_scale=0.0,
        logit_bias=None,
        preprocessing_from=preprocessing_from,
    )
    return VisionClip(model, None, identity, {"embed_dim": width}, device)


def load_timm(name: str, pretrained: str | None, trained: Trained, precision: Precision, device: str) -> VisionClip:
    """The teacher ``timm:MODEL``: a model of timm without its classifier, whose pooled features are the embedding.

    MODEL is what `timm.create_model` takes: a name, with a tag or without, ``hf-hub:ORG/MODEL`` or
    ``local-dir:FOLDER``. Weights are timm's own, or of the file `pretrained`. Images are prepared as timm's config
    says, or as the user gives it; but the whole image is seen, without the margin that timm's `crop_pct` cuts off.

    Raises TeacherError for an unknown model, and for weights that are not there or do not fit.
    """
    model_name = name.removeprefix(TIMM)
    if idle := [field for field in trained.fields() if field in ("activation", "assume_openai")]:
        raise TeacherError(f"{option_of(idle[0])} has no effect with {name}", remedy="leave it out")
    try:
        file = pretrained or _file_of(model_name)
        model = timm.create_model(model_name, pretrained=file is None, num_classes=0).eval()
        if file is None and not _has_weights(model):
            raise TeacherError(f"timm has no weights of {model_name}", remedy="give a file with --pretrained")
        if file is not None:
            _load_strictly(model, file)
        facts: dict[str, Any] = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            features_1D = model(torch.zeros(1, *facts["input_size"]))
    except TeacherError:
        raise
    except Exception as error:  # timm, torch and the Hub raise many kinds; all mean that the model cannot be had
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = "check the name and the network, or give a file of its weights with --pretrained"
        raise TeacherError(f"cannot load {name}: {reason}", remedy=remedy) from error
    if not isinstance(features_1D, torch.Tensor) or features_1D.ndim != 2:
        raise TeacherError(
            f"{name} does not give one embedding per image", remedy="give a model that pools its features"
        )
    preprocessing, origin = _preprocessing(name, facts, trained)
    return vision_clip(
        model, name, pretrained, preprocessing, features_1D.shape[1], precision=precision, device=device,
        preprocessing_from=origin,
    )  # fmt: skip


def _file_of(model_name: str) -> str | None:
    """The file of weights in a folder that timm wrote; None for another model."""
    if not model_name.startswith(FOLDER):
        return None
    names = ("model.safetensors", "pytorch_model.bin")
    files = [path for name in names if (path := Path(model_name.removeprefix(FOLDER), name)).is_file()]
    if not files:
        raise TeacherError(f"{model_name} has no {' and no '.join(names)}", remedy="give a file with --pretrained")
    return str(files[0])


def _has_weights(model: Any) -> bool:
    """Whether timm's config of a model names weights; without them timm leaves it random."""
    cfg = model.pretrained_cfg
    return any(cfg.get(place) for place in ("url", "file", "hf_hub_id", "state_dict"))


def _load_strictly(model: Any, file: str) -> None:
    """Load all weights but those of the classifier from a file. Raises TeacherError if others are missing or left
    over."""
    path = Path(file)
    state = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    )
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state.get(key), dict) else state
    state = {key.removeprefix("module."): value for key, value in state.items()}
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    wanted = model.state_dict()
    left_over = [key for key in state if key not in wanted and not key.startswith(heads)]
    missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if missing or left_over:
        names = f"{len(missing)} tensors are missing or of another shape, and {len(left_over)} left over"
        what = f"{file} does not fit: {names}, such as {(missing + left_over)[0]}"
        raise TeacherError(what, remedy="give weights that timm has saved of the same model")
    model.load_state_dict({key: state[key] for key in wanted})


def _preprocessing(name: str, facts: dict[str, Any], trained: Trained) -> tuple[Preprocessing, str]:
    """How images are prepared, and in words where that is from."""
    given = trained.fields()
    height, width = facts["input_size"][1:]
    found = {
        "mean": tuple(facts["mean"]), "std": tuple(facts["std"]), "interpolation": facts["interpolation"],
        "resize_mode": _MODES.get(facts["crop_mode"], "shortest"), **given,
    }  # fmt: skip
    if found["interpolation"] not in ("bicubic", "bilinear"):
        what = f"{name} has images resized by {found['interpolation']}, which dimefm does not have"
        raise TeacherError(what, remedy="give --interpolation bicubic, or another teacher")
    user = f", and the user ({', '.join(given)})" if given else ""
    origin = f"timm's config{user}, without its crop_pct"
    return Preprocessing(size=(height, width), **found), origin
