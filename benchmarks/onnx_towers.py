"""Every kind of tower as an ONNX graph: whether torch exports it, and how near onnxruntime's embeddings are.

A kind is a way in which towers of open_clip and timm differ in their code: pooling, position, masks, convolutions. Each
is built with random weights, with two layers where the config has layers, or is the smallest of timm's that has the
same code. Nothing is downloaded.

Shapes: B images or sentences, D embedding width.
"""

import copy
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import open_clip
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from torch import nn

from benchmarks.measure import table
from cache_schemas import Preprocessing
from dimefm.errors import DimefmError
from dimefm.export.onnx_format import ImageGraph, TextGraph
from dimefm.export.onnx_graph import write_graph

BATCHES = (1, 2, 7)
SMALL_VIT = {"layers": 2, "width": 128, "head_width": 32, "image_size": 64, "patch_size": 16}
SMALL_TEXT = {"layers": 2, "width": 128, "heads": 4}
HF_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 1000,
    "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128, "d_ff": 128,
    "num_layers": 2, "num_heads": 2, "d_kv": 32, "decoder_layers": 1, "decoder_attention_heads": 2,
    "decoder_ffn_dim": 128,
}  # fmt: skip
TIMM = (
    "test_resnet", "resnet18", "regnety_002", "mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_b0",
    "mobileone_s0", "repvit_m0_9", "convnext_atto", "convnextv2_atto", "fastvit_t8", "fastvit_mci0", "tiny_vit_5m_224",
    "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "vit_medium_patch16_gap_256", "eva02_tiny_patch14_224",
    "vit_relpos_small_patch16_224", "vit_pe_core_tiny_patch16_384", "vitamin_small_224", "levit_128s",
    "edgenext_xx_small", "mobilevit_xxs", "efficientvit_b0", "inception_next_atto", "starnet_s1", "shvit_s1",
    "ghostnet_100", "efficientformerv2_s0", "xcit_nano_12_p16_224",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of tower: how it is called, of what model, and how one is built."""

    tower: str
    title: str
    build: Callable[[], Any]


def kinds() -> list[Kind]:
    """All kinds, image towers first."""
    vit: dict[str, tuple[str, dict[str, Any]]] = {
        "ViT, class token (ViT-B-32)": ("ViT-B-32", {}),
        "ViT, averaged, no first norm (CLIPA)": ("ViT-H-14-CLIPA", {}),
        "ViT, layer scale (ViT-M-16-alt)": ("ViT-M-16-alt", {}),
        "ViT, attentional pool (CoCa)": ("coca_ViT-B-32", {"attn_pooler_heads": 4}),
        "ViT, attentional pool with 2 steps": ("coca_ViT-B-32", {"attentional_pool": "cascade"}),
        "ViT, sine positions": ("ViT-B-32", {"pos_embed_type": "sin_cos_2d"}),
        "ViT, first token pooled": ("ViT-B-32", {"pool_type": "tok", "final_ln_after_pool": True}),
        "CoCa base": ("coca_base", {}),
    }
    found = [Kind("image", title, partial(_vit, name, changes)) for title, (name, changes) in vit.items()]
    found.append(Kind("image", "ModifiedResNet, attention pool (RN50)", _resnet))
    found += [Kind("image", f"timm {name}", partial(_timm, name)) for name in TIMM]
    found.append(Kind("image", "timm, map pool (SigLIP)", partial(_timm, "vit_base_patch16_siglip_224", "map")))
    texts = {
        "CLIP (ViT-B-32)": "ViT-B-32",
        "no causal mask (MobileCLIP2-S0)": "MobileCLIP2-S0",
        "last token, no mask (CLIPA)": "ViT-H-14-CLIPA",
        "end of text token (worldwide)": "ViT-H-14-worldwide",
        "class token (CoCa)": "coca_ViT-B-32",
        "SigLIP": "ViT-B-16-SigLIP",
        "SigLIP i18n": "ViT-SO400M-16-SigLIP-i18n-256",
        "SigLIP 2": "ViT-B-16-SigLIP2",
    }
    found += [Kind("text", title, partial(_text, name, None)) for title, name in texts.items()]
    found += [Kind("text", f"CLIP, {length} tokens", partial(_text, "ViT-B-32", length)) for length in (8, 32, 248)]
    pools = {"roberta": "mean_pooler", "xlm-roberta": "mean_pooler", "mt5": "mean_pooler", "m2m_100": "cls_pooler"}
    found += [Kind("text", f"{name} of transformers", partial(_hf, name, pool)) for name, pool in pools.items()]
    return found


class _Model(nn.Module):
    """Towers under the names by which a graph calls them."""

    def __init__(self, *, image: Any = None, text: Any = None) -> None:
        super().__init__()
        self.image, self.text = image, text

    def encode_image(self, pixels: torch.Tensor) -> Any:
        return self.image(pixels)

    def encode_text(self, tokens: torch.Tensor) -> Any:
        return self.text(tokens)


def _small(name: str, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """An open_clip model of the kind of `name`, with small towers."""
    cfg = copy.deepcopy(open_clip.get_model_config(name))
    cfg["vision_cfg"] |= {**SMALL_VIT, **vision}
    cfg["text_cfg"] |= {**SMALL_TEXT, **text}
    cfg["embed_dim"] = 128
    custom = cfg.pop("custom_text", False) or "timm_model_name" in cfg["vision_cfg"]
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"] |= SMALL_TEXT
        return open_clip.CoCa(**cfg)
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"] = SMALL_VIT
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg)


def _vit(name: str, changes: dict[str, Any]) -> Any:
    return _small(name, changes, {})


def _resnet() -> Any:
    return open_clip.CLIP(
        embed_dim=128,
        vision_cfg={"layers": [1, 1, 1, 1], "width": 32, "image_size": 64, "patch_size": None},
        text_cfg=SMALL_TEXT,
    )


def _timm(name: str, pool: str = "") -> Any:
    facts = timm.get_pretrained_cfg(name)
    size = facts.input_size[-1] if facts.fixed_input_size else 64
    proj = "linear" if not pool else "none"
    tower = open_clip.timm_model.TimmModel(name, 128 if not pool else 768, size, pool=pool, proj=proj)
    return _Model(image=tower)


def _text(name: str, length: int | None) -> Any:
    return _small(name, {}, {} if length is None else {"context_length": length})


def _hf(kind: str, pool: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **HF_TINY)
    text = HFTextEncoder("", output_dim=128, config=config, pooler_type=pool, proj_type="linear", pretrained=False)
    if config.is_encoder_decoder:  # as open_clip does where it fetches the config itself
        text.transformer = text.transformer.encoder
    return _Model(text=text)


def try_kind(kind: Kind) -> tuple[str, ...]:
    """Tower, title, smallest cosine over several batch sizes, size, seconds; or why not."""
    began = time.monotonic()
    torch.manual_seed(0)
    try:
        model = kind.build().eval()
        graph = _graph(kind, model)
        graph(_inputs(kind, model, 2))
    except Exception as error:  # open_clip itself does not make a tower of it, so that it is no student either
        return kind.tower, kind.title, f"no tower: {_first_line(error)}", "", ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        names = ("inputs", "embeds")
        try:
            write_graph(graph, _inputs(kind, model, 2), path, names=names, facts={}, half=False)
            cosine = min(_cosine(graph, path, _inputs(kind, model, count)) for count in BATCHES)
        except DimefmError as error:
            return kind.tower, kind.title, f"no: {error.what}", "", ""
        except Exception as error:  # of onnxruntime: a graph that it does not take, or not at every batch size
            return kind.tower, kind.title, f"no: onnxruntime: {_first_line(error)}", "", ""
        size = path.stat().st_size / 1e6
    return kind.tower, kind.title, f"1 - {1 - cosine:.1e}", f"{size:.1f}", f"{time.monotonic() - began:.1f}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _graph(kind: Kind, model: Any) -> nn.Module:
    side = _side(model)
    facts = Preprocessing(
        size=(side, side), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", resize_mode="shortest"
    )
    return ImageGraph(model, facts, "float32") if kind.tower == "image" else TextGraph(model)


def _side(model: Any) -> int:
    tower = model.image if isinstance(model, _Model) else model.visual
    size = getattr(tower, "image_size", None) or getattr(tower, "input_resolution", 64)
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def _inputs(kind: Kind, model: Any, count: int) -> torch.Tensor:
    """Any pixels; tokens as a tokenizer makes them: an end, and padding after it."""
    draw = torch.Generator().manual_seed(count)
    if kind.tower == "image":
        return torch.randn(count, 3, _side(model), _side(model), generator=draw)
    length = getattr(model, "context_length", None) or getattr(model.text, "context_length", 77)
    tokens = torch.randint(3, 900, (count, int(length)), generator=draw)
    tokens[:, -3:] = torch.tensor([999, 1, 1]) if isinstance(model, _Model) else torch.tensor([31999, 0, 0])
    return tokens


def _cosine(graph: nn.Module, path: Path, inputs: torch.Tensor) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found_BD,) = session.run(None, {"inputs": inputs.numpy()})
    with torch.inference_mode():
        expected_BD = graph(inputs)
    return float(torch.cosine_similarity(torch.from_numpy(found_BD).double(), expected_BD.double(), dim=1).min())


@click.command(name="onnx-towers")
@click.option("--only", default="", help="Kinds whose tower and title this pattern is found in.")
def onnx_towers(only: str) -> None:
    """Which kinds of towers become ONNX graphs, and how well these agree with PyTorch."""
    warnings.simplefilter("ignore")
    rows = []
    for kind in kinds():
        if re.search(only, f"{kind.tower} {kind.title}"):
            rows.append(try_kind(kind))
            click.echo("  ".join(rows[-1]))
    click.echo(table(("tower", "kind", "smallest cosine", "MB", "seconds"), rows))
