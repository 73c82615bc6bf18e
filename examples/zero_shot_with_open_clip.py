"""Classify an image with an exported student in plain open_clip. dimefm is not needed for this, nor is a GPU.

    dimefm export RUN --out STUDENT
    python examples/zero_shot_with_open_clip.py STUDENT cat.jpg "a cat" "a dog" "an airplane"

The folder holds open_clip_config.json and open_clip_model.safetensors: copy it wherever open_clip is installed.
"""

import sys

import open_clip
import torch
from PIL import Image


def probabilities(folder: str, image: str, labels: list[str]) -> list[float]:
    """How likely each label is for the image, by the student. They add up to 1."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad(), Image.open(image) as picture:
        of_image = model.encode_image(preprocess(picture.convert("RGB"))[None], normalize=True)
        of_labels = model.encode_text(tokenize([f"a photo of {label}." for label in labels]), normalize=True)
        return (model.logit_scale.exp() * of_image @ of_labels.T).softmax(dim=-1)[0].tolist()


if __name__ == "__main__":
    folder, image, *labels = sys.argv[1:]
    for probability, label in sorted(zip(probabilities(folder, image, labels), labels, strict=True), reverse=True):
        print(f"{probability:6.1%}  {label}")
