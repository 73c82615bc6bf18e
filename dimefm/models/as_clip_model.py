"""A model of open_clip as a CLIPModel of Hugging Face's transformers: whether it is one, its config and its weights.

A CLIPModel has two towers of one kind: a ViT with a class token, and a text transformer with a causal mask, both
projected without a bias. open_clip's own towers of that kind have the same weights under other names (`_NAMES`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn

from dimefm.models.clip import Clip

_BLOCK = r"transformer\.resblocks\.(\d+)\."
_NAMES = [
    (r"visual\.proj", "visual_projection.weight"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"text_projection", "text_projection.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"logit_scale", "logit_scale"),
] + [
    (prefix + ours, f"{tower}.{theirs}")
    for prefix, tower in ((r"visual\.", "vision_model"), ("", "text_model"))
    for ours, theirs in (
        ("positional_embedding", "embeddings.position_embedding.weight"),
        (_BLOCK + r"ln_([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
        (_BLOCK + r"attn\.in_proj_(weight|bias)", r"encoder.layers.\1.self_attn.qkv.\2"),
        (_BLOCK + r"attn\.out_proj\.(weight|bias)", r"encoder.layers.\1.self_attn.out_proj.\2"),
        (_BLOCK + r"mlp\.c_fc\.(weight|bias)", r"encoder.layers.\1.mlp.fc1.\2"),
        (_BLOCK + r"mlp\.c_proj\.(weight|bias)", r"encoder.layers.\1.mlp.fc2.\2"),
    )
]
"""open_clip's names of weights, without "text." before those of a text tower, and those of a CLIPModel. What is named
qkv is three there, and projections are transposed."""

_HIGHEST = 2
"""As the end token of its config, it makes a CLIPTextModel pool at the highest id of a sentence, as open_clip does."""


def faults(clip: Clip) -> Iterator[str]:
    """What of a model a CLIPModel does not have."""
    image, text, facts = clip.model.visual, _text(clip), clip.identity
    if not isinstance(image, VisionTransformer):
        yield f"its image tower is a {type(image).__name__}, not open_clip's own ViT"
        return
    if not (isinstance(text, TextTransformer) or text is clip.model):
        yield f"its text tower is a {type(text).__name__}, not open_clip's own text transformer"
        return
    if not isinstance(clip.tokenizer, SimpleTokenizer):
        yield f"its tokenizer is a {type(clip.tokenizer).__name__}, not CLIP's"
    if image.attn_pool is not None or image.pool_type != "tok":
        yield "its image tower pools otherwise than by the class token"
    if not isinstance(image.ln_pre, nn.LayerNorm):
        yield "its image tower has no norm before the first layer"
    if text.attn_mask is None:
        yield "its text tower has no causal mask"
    if not isinstance(text.text_projection, nn.Parameter):
        yield "its text tower is not projected by a matrix alone"
    if facts.logit_bias is not None:
        yield "its logits have a bias"
    pool, end = _pooling(clip)
    if pool not in ("argmax", "eos") or (pool == "eos" and end != getattr(clip.tokenizer, "eot_token_id", end)):
        yield f"its text tower pools otherwise than at the end token ({pool})"
    for name, tower in (("image", image), ("text", text)):
        yield from _tower_faults(name, tower)
    if others := [name for name in clip.model.state_dict() if not _renamed(name)]:
        yield f"it has weights that no CLIPModel has, such as {others[0]}"
    size = facts.preprocessing.size
    if len({*size, *image.image_size}) > 1 or len(set(image.patch_size)) > 1:
        yield "its images or its patches are not square"
    if facts.preprocessing.resize_mode == "longest":
        yield "its images are resized by their longest side and padded (resize_mode longest)"


def _tower_faults(name: str, tower: Any) -> Iterator[str]:
    if _activation(tower) is None:
        yield f"its {name} tower has the activation {tower.transformer.resblocks[0].mlp[1]}"
    if len({norm.eps for norm in tower.modules() if isinstance(norm, nn.LayerNorm)}) > 1:
        yield f"its {name} tower has norms with different eps"


def _text(clip: Clip) -> Any:
    """The text tower: of open_clip's plain CLIP the model itself."""
    return getattr(clip.model, "text", clip.model)


def _pooling(clip: Clip) -> tuple[str, int]:
    """How the text tower pools, and the id of the token at which it does so."""
    model, text = clip.model, _text(clip)
    return (model.text_pool_type, model.text_eos_id) if text is model else (text.pool_type, text.eos_id)


def _activation(tower: Any) -> str | None:
    """transformers' name of the activation of a tower."""
    found = tower.transformer.resblocks[0].mlp[1]
    if isinstance(found, QuickGELU):
        return "quick_gelu"
    return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}.get(getattr(found, "approximate", ""))


def _renamed(name: str) -> str | None:
    for ours, theirs in _NAMES:
        if match := re.fullmatch(ours, name.removeprefix("text.")):
            return match.expand(theirs)
    return None


def clip_model_weights(clip: Clip) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by a CLIPModel's names."""
    for name, value in clip.model.state_dict().items():
        theirs = _renamed(name)
        assert theirs is not None
        if theirs.endswith("_projection.weight"):
            yield theirs, value.T
        elif ".qkv." in theirs:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                yield theirs.replace("qkv", f"{part}_proj"), third
        else:
            yield theirs, value.reshape(()) if theirs == "logit_scale" else value


def clip_model_config(clip: Clip) -> dict[str, object]:
    """The config.json of a CLIPModel."""
    image, text, width, tokenizer = clip.model.visual, _text(clip), clip.identity.embed_dim, clip.tokenizer
    end = tokenizer.eot_token_id
    pools_at = end if _pooling(clip)[0] == "eos" or end == max(tokenizer.decoder) else _HIGHEST
    text_config = _transformer(text) | {
        "model_type": "clip_text_model",
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": len(text.positional_embedding),
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": pools_at,
        "pad_token_id": end,
    }
    vision_config = _transformer(image) | {
        "model_type": "clip_vision_model",
        "image_size": image.image_size[0],
        "patch_size": image.patch_size[0],
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "logit_scale_init_value": float(clip.model.logit_scale.detach()),
        "text_config": text_config | {"projection_dim": width},
        "vision_config": vision_config | {"projection_dim": width},
    }


def _transformer(tower: Any) -> dict[str, object]:
    """What the configs of both towers have."""
    blocks = tower.transformer.resblocks
    return {
        "hidden_size": tower.transformer.width,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": _activation(tower),
        "layer_norm_eps": blocks[0].ln_1.eps,
    }
