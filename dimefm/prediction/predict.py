"""`dimefm predict`: which of some classes an image shows, and how likely each is.

Shapes: B images of a batch, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dimefm.errors import DimefmError
from dimefm.images.decode import DecodeError
from dimefm.images.open_clip_steps import input_pixels
from dimefm.prediction.classes import Classes, embed_classes, read_classes
from dimefm.prediction.config import PredictConfig
from dimefm.prediction.pictures import STDIN, Picture, find_pictures, read_picture
from dimefm.prediction.towers import Towers, open_towers
from dimefm.sources.account import Account
from dimefm.system.inert_text import line
from dimefm.system.machine import cpus
from dimefm.system.named_paths import allowing
from dimefm.system.notes import note
from dimefm.system.read_ahead import in_order
from dimefm.system.storage import CONNECTIONS

_BATCH = 16  # few, so that results are shown soon

_Array = np.ndarray[Any, Any]


class Guess(NamedTuple):
    """A class with its probability, and the cosine that it comes from."""

    name: str
    probability: float
    cosine: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the likeliest first."""

    image: str
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and why."""

    image: str
    reason: str


class Predictor:
    """A loaded model with classes and images. `by_itself` says that each class has a probability of its own, by a
    sigmoid, as the model was trained; else those of all classes add up to 1."""

    def __init__(self, towers: Towers, classes: Classes, pictures: Sequence[Picture], top_k: int) -> None:
        self.model, self.classes, self.pictures = towers.identity, classes, pictures
        self.by_itself = self.model.logit_bias is not None
        if len(classes.names) == 1 and not self.by_itself:
            what = f"{classes.names[0]!r} is the only class, and would have 100% of every image"
            raise DimefmError(what, remedy="name two classes or more")
        self.top_k, self._encode = top_k, towers.encode_images
        self._classes_CD = embed_classes(classes, towers.encode_texts)

    def run(self) -> Iterator[Prediction | Unreadable]:
        """An outcome for each image, in order, as soon as its batch is done. Only a few images are held at a time."""
        threads = CONNECTIONS if any(picture.url for picture in self.pictures) else cpus()
        loaded = zip(self.pictures, in_order(self._load, self.pictures, threads), strict=True)
        while batch := list(islice(loaded, _BATCH)):
            arrays = [found for _, found in batch if not isinstance(found, DecodeError)]
            guesses = iter(self._guesses(np.stack(arrays)) if arrays else ())
            for picture, found in batch:
                ranked = None if isinstance(found, DecodeError) else next(guesses)
                if ranked is not None:
                    yield Prediction(picture.name, ranked)
                else:
                    reason = found if isinstance(found, DecodeError) else "the model's embedding of it is not finite"
                    yield Unreadable(picture.name, str(reason))

    def _load(self, picture: Picture) -> _Array | DecodeError:
        data = b""
        try:
            data = read_picture(picture)
            return input_pixels(data, self.model.preprocessing)
        except DecodeError as error:
            if picture.name == STDIN and data and data.isascii():
                return DecodeError(error.status, f"{error}; for a list of paths give --images-from -")
            return error

    def _guesses(self, pixels_B3HW: _Array) -> Iterator[tuple[Guess, ...] | None]:
        """The likeliest classes of each image; None where its embedding is not finite."""
        for cosine_C in self._encode(pixels_B3HW).astype(np.float64) @ self._classes_CD.T.astype(np.float64):
            if not np.isfinite(cosine_C).all():
                yield None
                continue
            chance_C = self._chances(cosine_C)
            order_C = np.argsort(-cosine_C, kind="stable")[: self.top_k]
            yield tuple(Guess(self.classes.names[c], float(chance_C[c]), float(cosine_C[c])) for c in order_C)

    def _chances(self, cosine_C: _Array) -> _Array:
        """By softmax, or of a model with a logit bias, such as SigLIP, by sigmoid."""
        logit_C = self.model.logit_scale * cosine_C
        if self.model.logit_bias is not None:
            return np.asarray(1 / (1 + np.exp(-(logit_C + self.model.logit_bias))))
        raised_C = np.exp(logit_C - logit_C.max())
        return np.asarray(raised_C / raised_C.sum())


@contextmanager
def open_predictor(config: PredictConfig) -> Iterator[Predictor]:
    """Find all that is asked for, then load the model. Raises a DimefmError for classes, images or a model that cannot
    be used, and where one class alone would always have a probability of 1."""
    classes, account = read_classes(config), Account()
    with allowing([one for one in config.images if one != STDIN]):
        pictures = find_pictures(config.images, config.images_from, account)
        for skipped in account.lines():
            note(f"not used: {line(skipped)}")
        with open_towers(config) as towers:
            yield Predictor(towers, classes, pictures, config.top_k)
