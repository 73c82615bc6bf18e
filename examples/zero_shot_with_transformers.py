"""Classify an image with an exported student in plain transformers. Neither dimefm nor open_clip is needed for this.

    dimefm export RUN --format transformers --out STUDENT
    python examples/zero_shot_with_transformers.py STUDENT cat.jpg "a cat" "a dog" "an airplane"

The folder holds a CLIPModel with its processor and tokenizer: AutoModel, AutoProcessor and AutoTokenizer load it too.
"""

import sys

from transformers import pipeline


def probabilities(folder: str, image: str, labels: list[str]) -> list[float]:
    """How likely each label is for the image, by the student. They add up to 1."""
    classify = pipeline("zero-shot-image-classification", model=folder)
    found = classify(image, candidate_labels=labels, hypothesis_template="a photo of {}.")
    chances = {one["label"]: one["score"] for one in found}
    return [chances[label] for label in labels]


if __name__ == "__main__":
    folder, image, *labels = sys.argv[1:]
    for probability, label in sorted(zip(probabilities(folder, image, labels), labels, strict=True), reverse=True):
        print(f"{probability:6.1%}  {label}")
