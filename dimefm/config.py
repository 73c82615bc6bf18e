"""The config of a training run. Written into the run folder as it is, and read back from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cache_schemas import parse_dataclass, to_plain
from dimefm.errors import TrainingError
from dimefm.losses import LossConfig
from dimefm.textbank import TextMix

MAY_DIFFER = ("images", "texts", "pairs", "selection", "out", "val", "val_texts", "workers", "log_every", "device")
"""Fields in which a resumed run may differ from its start: where things are and how fast, not what is computed."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a student. Paths are those of the stores; sizes in images, texts, pixels, epochs.

    `batch_size` is of all processes together. `val` lists labelled sets, whose prompts must all be
    in the text store `val_texts` (default: `texts`). Selected texts of the mix are drawn from `selection`, without one
    from those that `pairs` has for an image or more. `crop_scale` and `flip` are for images cached whole: a store of
    views brings its own crops and flips.
    """

    images: str
    texts: str
    out: str
    student: str
    epochs: float
    batch_size: int
    texts_per_step: int
    lr: float
    min_lr: float
    warmup_lr: float
    warmup_epochs: float
    weight_decay: float
    loss: LossConfig
    text_mix: TextMix
    crop_scale: tuple[float, float]
    precision: Literal["fp32", "bf16", "fp16"]
    pairs: str | None = None
    selection: str | None = None
    val: tuple[str, ...] = ()
    val_texts: str | None = None
    val_every: float = 1.0
    image_size: int | None = None
    flip: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0
    max_steps: int | None = None
    checkpoint_every: int = 1000
    log_every: int = 50
    workers: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        wrong = [
            f"{name} must be above 0, found {getattr(self, name)}"
            for name in ("epochs", "batch_size", "texts_per_step", "lr", "checkpoint_every", "log_every", "val_every")
            if getattr(self, name) <= 0
        ]
        if self.image_size is not None and self.image_size < 1:
            wrong.append(f"image_size must be above 0, found {self.image_size}")
        if not 0 < low <= high <= 1:
            wrong.append(f"crop_scale must be 0 < low <= high <= 1, found {self.crop_scale}")
        drawn = self.text_mix.retrieved or (self.text_mix.selected and not self.selection)
        if self.pairs and not drawn:
            wrong.append("pairs are given, but the text mix draws nothing from them")
        if self.selection and not self.text_mix.selected:
            wrong.append("a selection is given, but the text mix draws nothing from it")
        if not any((self.loss.vl, self.loss.pvl, self.loss.udist, self.loss.cosine, self.loss.centred)):
            wrong.append("every loss has weight 0")
        if wrong:
            raise TrainingError("; ".join(wrong), remedy="change the named options")

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in run.json."""
        return to_plain(self)  # type: ignore[no-any-return]

    @staticmethod
    def parse(raw: object, where: str) -> TrainConfig:
        """The config in a run.json. Raises SchemaError with every problem."""
        return parse_dataclass(TrainConfig, raw, where)

    def differences(self, other: TrainConfig) -> list[str]:
        """The fields that decide the result and in which `other` differs, as ``field: mine != theirs``."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{k}: {mine[k]} != {theirs[k]}" for k in mine if k not in MAY_DIFFER and mine[k] != theirs[k]]
