"""What `dimefm predict` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from cache_schemas.run import Weights
from dimefm.models.trained import Trained


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """A model, images, and the classes to choose from."""

    model: str
    """Model to ask: a run folder, an exported folder of any format, or an open_clip name (also hf-hub:, local-dir:)."""
    images: tuple[str, ...] = ()
    """Image files, folders, tars and tables, also as globs and URLs, and - for an image on standard input."""
    images_from: str | None = None
    """File with the path or URL of an image on each line; - for standard input."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    classes_from: str | None = None
    """File with the name of a class on each line, as classnames.txt of a labelled set."""
    templates: str | None = None
    """File with a prompt on each line, with {c} for the class. Default: "a photo of a {c}."."""
    top_k: int = 5
    """Classes to show of each image, the likeliest first."""
    pretrained: str | None = None
    """Weights of a plain NAME: an open_clip tag or a file."""
    trained: Trained | None = None
    """What weights in a file do not say of themselves: their preprocessing and activation."""
    checkpoint: str = "last"
    """Checkpoint of a run: last, best or the number of a step."""
    weights: Weights = "model"
    """Weights of a run: those that were trained (model), or their moving average (ema)."""
    device: str | None = None
    """Where the model runs. Default: cuda if there is a GPU, else cpu; an ONNX model runs on the CPU."""
