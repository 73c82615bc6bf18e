"""Weights as a file of safetensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, which may share memory, to `path`. Raises OSError where that fails."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, path, {"format": "pt"})
    except Exception as error:  # safetensors, a library in Rust, has errors of the system only in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    path.chmod(mode)  # safetensors makes files that their owner alone can read, whatever the umask says
