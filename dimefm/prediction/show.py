"""Predictions for people and for programs."""

from __future__ import annotations

from typing import Any

from dimefm.prediction.predict import Prediction, Predictor, Unreadable
from dimefm.system.inert_text import line

_WIDEST = 40  # letters of a class that others are aligned to


def show(found: Prediction, predictor: Predictor) -> str:
    """An image with its likeliest classes below it. Where only one is asked for, they are one line, with the image at
    the end: so lines of many images are aligned, and can be sorted."""
    rows = [(f"{guess.probability:6.1%}", line(guess.name)) for guess in found.guesses]
    if predictor.top_k == 1:
        ((chance, name),) = rows
        width = min(_WIDEST, max(len(line(one)) for one in predictor.classes.names))
        return f"{chance}  {name:<{width}}  {line(found.image)}"
    return "\n".join([line(found.image), *(f"  {chance}  {name}" for chance, name in rows)])


def document(found: list[Prediction | Unreadable], predictor: Predictor) -> dict[str, Any]:
    """All outcomes."""
    return {
        "model": predictor.model.name,
        "weights": predictor.model.weights,
        "probabilities": "sigmoid" if predictor.by_itself else "softmax",
        "classes": predictor.classes.names,
        "templates": predictor.classes.templates,
        "images": [
            {
                "image": one.image,
                "classes": [
                    {"class": guess.name, "probability": guess.probability, "cosine": guess.cosine}
                    for guess in one.guesses
                ],
            }
            for one in found
            if isinstance(one, Prediction)
        ],
        "unreadable": [{"image": one.image, "reason": one.reason} for one in found if isinstance(one, Unreadable)],
    }
