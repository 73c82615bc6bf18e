"""Encode a few rows again before their embeddings are imported: whether the named teacher made them, of these images.

Shapes: N rows, D embedding width, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dimefm.errors import MismatchError, SourceError
from dimefm.exchange.clip_retrieval_folder import Folder
from dimefm.exchange.likely_cause import likely_cause
from dimefm.exchange.match_names import WHOLE, Matches, kind
from dimefm.images.decode import DecodeError
from dimefm.images.preprocess import Preprocess
from dimefm.models.clip import Clip
from dimefm.sources.read_image import ImagePlace, read_encoded

_LEAST_COSINE = 0.99


def compare_with_teacher(
    folder: Folder,
    rows_N: np.ndarray[Any, Any],
    matches: Matches | None,
    clip: Clip,
    *,
    teacher: str,
    accept: bool,
    report: Callable[[str], None],
) -> list[str]:
    """Encode these rows again with `clip`, which the user calls `teacher`, and compare; returns notes for the store.
    Raises MismatchError below a mean cosine of 0.99, unless `accept`: the same teacher in another precision gives
    0.999, another teacher or another image far less."""
    keys = folder.lookup(rows_N.tolist())
    cosines, misfits = _cosines(folder, keys, matches, clip)
    if not cosines and not accept:
        zero = sum(not folder.read(row, row + 1)[1][0] for row in keys)
        what = f"{folder.root}: of {len(keys)} rows none can be encoded again and compared: {zero} are NaN, infinite or"
        what += f" zero, of {len(keys) - zero} the {folder.kind} cannot be read, such as row {min(keys)}"
        raise SourceError(what, remedy="look at the vectors and the images; --accept takes them as they are")
    mean = float(np.mean(list(cosines.values()))) if cosines else float("nan")
    found = f"mean cosine {mean:.4f} to {teacher}, over {len(cosines)} of {len(rows_N)} rows encoded again"
    weakest = int(matches.parts_N[rows_N[0]]) if matches else 0
    if matches and weakest < WHOLE:
        count = int((matches.parts_N[rows_N] == weakest).sum())
        found += f", {count} of them matched by {kind(weakest)}"
    report(found)
    if mean >= _LEAST_COSINE:
        return []
    if accept:
        return [f"accepted at a {found}"]
    what = f"{folder.root}: {found}: these embeddings are not from that teacher, or not of these {folder.kind}s"
    if cosines and matches:
        row = min(cosines, key=lambda one: cosines[one])
        what += f"; least {cosines[row]:.4f}, row {row} ({keys[row][0]!r}) and its image in {matches.place(row).file}"
        images, embeddings = zip(*misfits, strict=True)
        if cause := likely_cause(clip, list(images), np.stack(embeddings), _LEAST_COSINE):
            what += f"; of the {len(misfits)} rows below {_LEAST_COSINE}, {cause}"
    remedy = "name the teacher that made them; --accept takes them as they are"
    if 0 < weakest < WHOLE:
        remedy += f"; --match-parts {weakest + 1} leaves rows without an image that are matched by {kind(weakest)}"
    raise MismatchError(what, remedy=remedy)


def _cosines(
    folder: Folder, keys: dict[int, tuple[str, str | None]], matches: Matches | None, clip: Clip
) -> tuple[dict[int, float], list[tuple[bytes, np.ndarray[Any, Any]]]]:
    """By row, the cosine of its embedding to that of the teacher, where both exist; and the image and embedding (D,) of
    each row that is below the least cosine."""
    cosines: dict[int, float] = {}
    misfits: list[tuple[bytes, np.ndarray[Any, Any]]] = []
    for row, (_, caption) in keys.items():
        embedding_1D, good_1 = folder.read(row, row + 1)
        data = _read(matches.place(row)) if matches else b""
        again_D = _encode(clip, data, caption) if good_1[0] else None
        if again_D is not None:
            embedding_D = embedding_1D[0].astype(np.float32)
            cosines[row] = float(embedding_D @ again_D)
            if data and cosines[row] < _LEAST_COSINE:
                misfits.append((data, embedding_D))
    return cosines, misfits


def _read(place: ImagePlace) -> bytes:
    """The encoded image at a place; no bytes where it cannot be read."""
    try:
        return read_encoded(place) if place.file else b""
    except (OSError, DecodeError):
        return b""


def _encode(clip: Clip, image: bytes, caption: str | None) -> np.ndarray[Any, Any] | None:
    """The teacher's embedding of a caption, or else of an image, float32 (D,); None for an image that cannot be
    decoded."""
    if caption is not None:
        return clip.encode_texts([caption])[0].cpu().numpy()
    try:
        pixels_3HW = Preprocess(clip.identity.preprocessing)(image)
    except DecodeError:
        return None
    return clip.encode_images(pixels_3HW[None])[0].cpu().numpy()
