"""Who made an embedding: the facts about a teacher that decide what vectors it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cache_schemas.document import to_plain

Activation = Literal["gelu", "quick_gelu"]
Interpolation = Literal["bicubic", "bilinear"]
Precision = Literal["fp32", "bf16", "fp16"]
ResizeMode = Literal["shortest", "longest", "squash"]

_NOT_COMPARED = ("name", "pretrained", "preprocessing_from")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """open_clip's evaluation preprocessing as facts; sizes in pixels (height, width), mean and std of [0, 1] RGB."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal[Interpolation, "random"]
    resize_mode: ResizeMode
    fill_color: int = 0


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """Two stores agree on their teacher when these agree. `name` and `pretrained` say where it was loaded from;
    they are not compared, since the weight digest says more and a folder may move. `weights` is the digest of the
    weights as they were loaded; in `precision` they are held, and products computed. `preprocessing_from` says in words
    who has told the preprocessing, and is not compared either; None in older documents."""

    name: str
    pretrained: str | None
    weights: str
    activation: Activation
    preprocessing: Preprocessing
    tokenizer: str
    context_length: int
    embed_dim: int
    precision: Precision
    logit_scale: float
    logit_bias: float | None
    preprocessing_from: str | None = None

    def differences(self, other: TeacherIdentity, *, ignore: tuple[str, ...] = ()) -> list[str]:
        """The fields in which `other` differs, as ``field: mine != theirs``; empty when the teachers agree."""
        mine, theirs = to_plain(self), to_plain(other)
        skip = {*_NOT_COMPARED, *ignore}
        return [f"{k}: {mine[k]} != {theirs[k]}" for k in mine if k not in skip and mine[k] != theirs[k]]

    def compared(self) -> dict[str, object]:
        """The fields that count, as plain data: what goes into a store's identity digest."""
        return {k: v for k, v in to_plain(self).items() if k not in _NOT_COMPARED}
