"""The formats that a model can leave in: a module of this room for each, and what is known of all."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from cache_schemas.export import (
    IMAGE_ONNX,
    TEXT_ONNX,
    TRANSFORMERS_CONFIG,
    TRANSFORMERS_WEIGHTS,
    ExportFormat,
    OnnxFacts,
)
from cache_schemas.run import CONFIG_FILE, WEIGHTS_FILE
from dimefm.models.exported import require_packages

if TYPE_CHECKING:
    from dimefm.export.config import ExportConfig
    from dimefm.models.clip import Clip


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format has to say of what it wrote."""

    weights: str
    """Digest of the weights, as in the identity of a teacher."""
    text_tower: str
    """Digest of the text tower, by which evaluations share the embeddings of texts."""
    onnx: OnnxFacts | None = None


class Writer(Protocol):
    """Writes `clip`, which was loaded in float32 on the CPU from the open_clip folder `source`, to `folder`. Raises
    a DimefmError for a model that the format cannot hold."""

    def __call__(self, clip: Clip, source: Path, folder: Path, config: ExportConfig) -> Written: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: the module with its `write`, the packages that needs, and the files by which two folders are told
    apart."""

    module: str
    needs: tuple[str, ...]
    files: tuple[str, ...]

    def writer(self) -> Writer:
        """The function that writes the format."""
        return cast(Writer, import_module(self.module).write)

    def require(self) -> None:
        """Raises DimefmError unless the packages that writing needs are installed."""
        require_packages(self.needs, f"--format {self.name}")

    @property
    def name(self) -> ExportFormat:
        return next(name for name, one in FORMATS.items() if one is self)


FORMATS: dict[ExportFormat, Format] = {
    "open_clip": Format(module="dimefm.export.open_clip_format", needs=(), files=(CONFIG_FILE, WEIGHTS_FILE)),
    "onnx": Format(
        module="dimefm.export.onnx_format",
        needs=("onnx", "onnxscript", "onnxruntime", "tokenizers"),
        files=(IMAGE_ONNX, TEXT_ONNX),
    ),
    "transformers": Format(
        module="dimefm.export.transformers_format",
        needs=("transformers",),
        files=(TRANSFORMERS_CONFIG, TRANSFORMERS_WEIGHTS),
    ),
}
