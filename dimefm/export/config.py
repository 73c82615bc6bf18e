"""What `dimefm export` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cache_schemas.export import ExportFormat, ImageInput
from cache_schemas.run import Weights
from dimefm.errors import DimefmError
from dimefm.export.licences import require_licence
from dimefm.system.output_names import require_name


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A trained run, or a model in an open_clip folder, and the form in which it is to leave."""

    source: str
    out: str
    """Folder to write."""
    format: ExportFormat = "open_clip"
    """open_clip: for open_clip and dimefm; onnx: two graphs for onnxruntime, without torch; transformers: a CLIPModel
    of Hugging Face, for ViT students."""
    checkpoint: str = "last"
    """Checkpoint of a run: last, best, or the number of a step."""
    weights: Weights = "model"
    """Weights of the checkpoint: model, or ema for their moving average."""
    teacher: str | None = None
    """Where the teacher is now, or of several teachers the number of the one whose text tower the student gets.
    Default: the first, where it was when the images were cached."""
    pretrained: str | None = None
    """Tag or file of the teacher's weights."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Number format of the weights; fp16 halves the folder."""
    int8: bool = False
    """Quantize the ONNX graphs to 8 bits, and measure the loss in top-1 accuracy."""
    max_loss: float = 1.0
    """Points of top-1 accuracy that `int8` may lose; if it loses more, nothing is written."""
    accept: bool = False
    """Write the folder even if `int8` loses more than `max_loss`."""
    image_input: ImageInput = "float32"
    """Pixels that the ONNX graph takes: float32, normalised before, or uint8, normalised within the graph."""
    check_on: tuple[str, ...] = ()
    """Labelled set that the exported model is checked on. Default: the --val sets of the run."""
    evaluation: tuple[str, ...] = ()
    """Folder of an evaluation of the same run and checkpoint, for the model card; of other formats than open_clip the
    written folder is evaluated, and dimefm card adds that."""
    license: str | None = None
    """Licence of the weights for the model card, by its identifier on the Hub, such as mit, cc-by-nc-4.0 or other."""
    data_license: str | None = None
    """Licence of the images and sentences that the student was trained on, in words, for the model card."""

    def __post_init__(self) -> None:
        require_name(self.out, "a folder with a model")
        if self.license:
            require_licence(self.license)
        if self.evaluation and self.format != "open_clip":
            what = f"--evaluation has no effect on {self.format}: the results of the run are of other weights"
            raise DimefmError(what, remedy="evaluate the written folder, and add that with dimefm card --evaluation")
        if self.format != "onnx":
            for option, given in (("--int8", self.int8), ("--image-input", self.image_input != "float32")):
                if given:
                    raise DimefmError(f"{option} has no effect on {self.format}", remedy="give --format onnx")
        if self.int8 and self.precision == "fp16":
            raise DimefmError("--int8 quantizes float32 weights, and not fp16", remedy="leave --precision out")
        for option, given in (("--max-loss", self.max_loss != 1.0), ("--accept", self.accept)):
            if given and not self.int8:
                raise DimefmError(f"{option} has no effect without --int8", remedy="give --int8 too")
