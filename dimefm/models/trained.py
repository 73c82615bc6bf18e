"""What a user says of weights in a file. It needs no open_clip, so that options are checked before that is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_schemas.identity import Activation, Interpolation, ResizeMode
from dimefm.errors import SourceError, TeacherError


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How the weights in a file were trained, as the user gives it where the file does not. None: not given."""

    mean: tuple[float, float, float] | None = None
    """Mean colour, from 0 to 1, that weights in a file were trained with; needed where no known tag has it."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of colours that weights in a file were trained with; needed as `mean` is."""
    interpolation: Interpolation | None = None
    """How images were resized when weights in a file were trained; needed as `mean` is."""
    resize_mode: ResizeMode | None = None
    """Which side of images was resized when weights in a file were trained (squash: both); needed as `mean` is."""
    activation: Activation | None = None
    """Activation of weights in a file; needed where the known tags differ."""
    assume_openai: bool = False
    """Take OpenAI's preprocessing for weights in a file, as far as nothing else gives it."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name) or ()
            if not all(0 <= value <= 1 for value in values) or (name == "std" and 0 in values):
                what = f"{option_of(name)} {shown(values)} is not for colours from 0 to 1"
                raise TeacherError(what, remedy="divide values for colours from 0 to 255 by 255")

    def fields(self) -> dict[str, Any]:
        """The facts that are given, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


def checkpoint_file(checkpoint: str) -> Path:
    """The path of a checkpoint. Raises SourceError where there is no file."""
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise SourceError(f"{checkpoint} {what}", remedy="give the checkpoint itself, a file on a local disk")
    return path


def option_of(field: str) -> str:
    """The option of the command line that gives a field."""
    return f"--{field.replace('_', '-')}"


def shown(value: Any) -> str:
    """A value as an option takes it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
