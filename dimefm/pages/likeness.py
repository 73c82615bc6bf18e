"""How alike the rows of a sample are: cosines of random pairs, and what is nearest to each row.

Shapes: N rows, D embedding width, P pairs. Embeddings are float32 of length 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_BLOCK = 512  # rows whose cosines to all others are in memory at once


class Nearest(NamedTuple):
    """For each row the place of its nearest other row, int64 (N,), and their cosine, float32 (N,)."""

    place_N: np.ndarray[Any, Any]
    cosine_N: np.ndarray[Any, Any]

    def pairs(self, count: int) -> list[tuple[int, int, float]]:
        """The `count` most alike pairs, each once: the places of both, and their cosine."""
        found: dict[tuple[int, int], float] = {}
        for place in np.argsort(-self.cosine_N, kind="stable").tolist():
            other = int(self.place_N[place])
            found.setdefault((min(place, other), max(place, other)), float(self.cosine_N[place]))
            if len(found) == count:
                break
        return [(*pair, cosine) for pair, cosine in found.items()]


def nearest(embedding_ND: np.ndarray[Any, Any]) -> Nearest:
    """What is nearest to each of at least two rows."""
    places, cosines = list[Any](), list[Any]()
    for at in range(0, len(embedding_ND), _BLOCK):
        cosine_BN = embedding_ND[at : at + _BLOCK] @ embedding_ND.T
        own_B = np.arange(len(cosine_BN))
        cosine_BN[own_B, at + own_B] = -np.inf
        places.append(cosine_BN.argmax(axis=1))
        cosines.append(cosine_BN[own_B, places[-1]])
    return Nearest(np.concatenate(places), np.concatenate(cosines).clip(-1, 1))


def random_cosines(embedding_ND: np.ndarray[Any, Any], count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """The cosines of `count` random pairs of at least two rows, float32 (P,)."""
    rng, rows = np.random.default_rng(seed), len(embedding_ND)
    one_P = rng.integers(0, rows, count)
    other_P = (one_P + rng.integers(1, rows, count)) % rows  # another row than the first
    found: np.ndarray[Any, Any] = np.einsum("pd,pd->p", embedding_ND[one_P], embedding_ND[other_P]).clip(-1, 1)
    return found
