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
    """open_clip's evaluation preprocessing as facts: size in pixels (height, width), mean and std of RGB in [0, 1]."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal[Interpolation, "random"]
    resize_mode: ResizeMode
    fill_color: int = 0


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """A teacher by its facts. Two stores have the same teacher if all fields agree that are compared.

    `name` and `pretrained` say where it was loaded from; they are not compared, since a folder may move and the digest
    of the weights says more. `weights` is the digest of the weights as they were loaded; `precision` is the number
    format in which they are held and products are computed. `preprocessing_from` says in words where the preprocessing
    was taken from; it is not compared either, and is None in older documents.

    A vision-only model has no text tower: its `tokenizer` is empty, `context_length` and `logit_scale` are 0, and
    `activation` is that of the towers of its students.
    """

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

    @property
    def has_text(self) -> bool:
        """Whether it has a text tower."""
        return self.tokenizer != ""

    def differences(self, other: TeacherIdentity, *, ignore: tuple[str, ...] = ()) -> list[str]:
        """The fields in which `other` differs, each as ``field: mine != theirs``; empty if the teachers agree."""
        mine, theirs = to_plain(self), to_plain(other)
        skip = {*_NOT_COMPARED, *ignore}
        return [f"{k}: {mine[k]} != {theirs[k]}" for k in mine if k not in skip and mine[k] != theirs[k]]

    def compared(self) -> dict[str, object]:
        """The fields that are compared, as plain data: they go into the digest that is a store's identity."""
        return {k: v for k, v in to_plain(self).items() if k not in _NOT_COMPARED}
