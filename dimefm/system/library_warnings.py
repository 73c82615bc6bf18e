"""Warnings of libraries that cannot help a user of the command line. All others are shown as they come."""

from __future__ import annotations

import logging
import warnings
from functools import partial

_USELESS = (
    # --workers is the user's own choice, and the log says how long training waits for data
    (UserWarning, r"This DataLoader will create \d+ worker processes", r"torch\.utils\.data"),
)
_USELESS_LOGS = (
    # of torch.compile on a CPU, where the machine has files of CUDA
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)


def silence() -> None:
    """Show none of the warnings above from now on in this process. Imports none of the libraries."""
    for category, message, module in _USELESS:
        warnings.filterwarnings("ignore", message, category, module)
    for name, message in _USELESS_LOGS:
        logging.getLogger(name).addFilter(partial(_is_other, message))


def _is_other(useless: str, record: logging.LogRecord) -> bool:
    return useless not in record.getMessage()
