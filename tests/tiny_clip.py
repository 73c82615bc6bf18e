"""A CLIP of a few thousand weights besides its vocabulary, for tests in which any numbers will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch

from dimefm.models.open_clip_folder import publish_folder

SIDE, WIDTH = 32, 16
CONFIG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": SIDE},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
_PREPROCESSING = {
    "size": [SIDE, SIDE],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def write_clip(folder: Path, image_seed: int = 0, text_seed: int = 0, scale: float = 1.0, width: int = WIDTH) -> str:
    """An open_clip folder with random towers, those of equal seeds the same; its path. With a `scale` of 3, matrices
    are so much larger than open_clip's first ones that embeddings differ as much as a trained model's do."""
    config, towers = {**CONFIG, "embed_dim": width}, []
    for seed in (image_seed, text_seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            towers.append(open_clip.CLIP(**config).state_dict())
    image, text = towers
    weights = {name: (image if name.startswith("visual.") else text)[name] for name in image}
    weights = {name: value * scale if value.ndim > 1 else value for name, value in weights.items()}
    publish_folder(folder, {"model_cfg": config, "preprocess_cfg": _PREPROCESSING}, weights, None)
    return str(folder)
