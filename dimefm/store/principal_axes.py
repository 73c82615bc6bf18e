"""The directions in which embeddings differ most, for maps of them.

Shapes: N rows, D embedding width, P axes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class PrincipalAxes(NamedTuple):
    """The mean of some rows, float32 (D,), and orthogonal axes, float32 (P, D), the one of most variance first."""

    mean_D: np.ndarray[Any, Any]
    axes_PD: np.ndarray[Any, Any]

    def place(self, embedding_ND: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The places of any rows along the axes, float32 (N, P)."""
        found: np.ndarray[Any, Any] = (embedding_ND.astype(np.float32) - self.mean_D) @ self.axes_PD.T
        return found


def principal_axes(embedding_ND: np.ndarray[Any, Any], count: int = 2) -> PrincipalAxes:
    """The axes of rows by principal component analysis. The sign of each is such that its largest part is positive."""
    mean_D = embedding_ND.mean(axis=0, dtype=np.float32)
    centred_ND = embedding_ND.astype(np.float32) - mean_D
    _, vectors_DD = np.linalg.eigh(centred_ND.T @ centred_ND)  # in order of ascending variance
    axes_PD = vectors_DD[:, : -count - 1 : -1].T
    largest_P1 = np.take_along_axis(axes_PD, np.abs(axes_PD).argmax(axis=1)[:, None], axis=1)
    return PrincipalAxes(mean_D, axes_PD * np.sign(largest_P1))
