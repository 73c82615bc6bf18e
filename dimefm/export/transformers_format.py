"""The format of Hugging Face's transformers: a CLIPModel, with the files of its image processor and its tokenizer. What
a CLIPModel does not have is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from cache_schemas.export import TRANSFORMERS_CONFIG, TRANSFORMERS_IMAGES, TRANSFORMERS_WEIGHTS
from dimefm.errors import DimefmError
from dimefm.export.config import ExportConfig
from dimefm.export.formats import Written
from dimefm.models.as_clip_model import clip_model_config, clip_model_weights, faults
from dimefm.models.clip import Clip
from dimefm.models.tokenizer_file import write_tokenizer
from dimefm.models.transformers_clip import RESAMPLE, load_transformers
from dimefm.models.weights_file import write_weights


def write(clip: Clip, source: Path, folder: Path, config: ExportConfig) -> Written:
    """See formats.Writer."""
    if unfit := list(faults(clip)):
        remedy = (
            "give --format open_clip or onnx; of open_clip's image towers, most named ViT fit: ViT-S-32-alt, for one"
        )
        raise DimefmError(f"a CLIPModel of transformers cannot hold this model: {'; '.join(unfit)}", remedy=remedy)
    dtype = "float16" if config.precision == "fp16" else "float32"
    weights = {name: value.to(getattr(torch, dtype)) for name, value in clip_model_weights(clip)}
    write_weights(folder / TRANSFORMERS_WEIGHTS, weights)
    files = {
        TRANSFORMERS_CONFIG: clip_model_config(clip) | {"dtype": dtype},
        TRANSFORMERS_IMAGES: _images(clip),
        "tokenizer_config.json": _tokens(clip),
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(clip.tokenizer, folder, clip.identity.context_length)
    written = load_transformers(str(folder), clip.identity.name, "fp32", "cpu")
    return Written(weights=written.identity.weights, text_tower=written.text_digest())


def _images(clip: Clip) -> Mapping[str, object]:
    """preprocessor_config.json."""
    facts = clip.identity.preprocessing
    size = {"height": facts.size[0], "width": facts.size[1]}
    squash = facts.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size if squash else {"shortest_edge": facts.size[0]},
        "resample": RESAMPLE.get(facts.interpolation, RESAMPLE["bicubic"]),
        "do_center_crop": not squash,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": facts.mean,
        "image_std": facts.std,
    }


def _tokens(clip: Clip) -> dict[str, object]:
    """tokenizer_config.json. For the class CLIPTokenizer, transformers 5 would use the vocabulary alone, without the
    cleaning of tokenizer.json. Padding by the end token changes nothing, since the first one counts."""
    begin, end = (clip.tokenizer.decoder[one] for one in (clip.tokenizer.sot_token_id, clip.tokenizer.eot_token_id))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "CLIPProcessor",
        "bos_token": begin,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": clip.identity.context_length,
        "clean_up_tokenization_spaces": False,
    }
