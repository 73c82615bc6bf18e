"""What half precision does to a teacher's embeddings: how far they are from its float32 ones, and so its logits."""

import gzip
import logging
import warnings

import click
import open_clip
import torch

from benchmarks.measure import machine, table
from benchmarks.stage1 import gather
from dimefm.images.preprocess import Preprocess
from dimefm.models.clip import Clip, load_clip, wrap
from dimefm.sample import sample_dir
from dimefm.system.machine import choose_device

_SCALE = 100  # of CLIP's logits


@click.command()
@click.option("--models", default="sample,ViT-B-32,ViT-L-14", show_default=True,
              help="sample is its teacher; others of open_clip get random weights.")  # fmt: skip
@click.option("--count", default=8, show_default=True, help="Images and sentences.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
def precision(models: str, count: int, device: str | None) -> None:
    """1 - cosine, and the change of a logit at scale 100, of fp16 and bf16 against fp32."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # open_clip's, that weights are random
    images = list(gather(sorted((sample_dir() / "images").iterdir()), count).values())
    lines = gzip.decompress((sample_dir() / "texts" / "visual_coco_val2017.txt.gz").read_bytes()).decode().splitlines()
    device, rows = choose_device(device), []
    for name in models.split(","):
        found = {kind: _embed(_load(name, kind, device), images, lines[:count]) for kind in ("fp32", "fp16", "bf16")}
        for kind in ("fp16", "bf16"):
            off = [1 - (found[kind][side] * found["fp32"][side]).sum(dim=1) for side in (0, 1)]
            logits = _SCALE * (found[kind][0] @ found[kind][1].T - found["fp32"][0] @ found["fp32"][1].T).abs()
            rows.append((name, kind, *(f"{o.mean():.1e} ({o.max():.1e})" for o in off),
                         f"{logits.mean():.3f} ({logits.max():.3f})"))  # fmt: skip
    head = ("model", "", "images: 1 - cosine, mean (worst)", "sentences", "logit, mean (worst)")
    click.echo(table(head, rows))
    click.echo(f"{machine()}, on {device}; {count} images and sentences of the sample; random weights of seed 0")


def _load(name: str, kind: str, device: str) -> Clip:
    if name == "sample":
        return load_clip(f"local-dir:{sample_dir() / 'teacher'}", precision=kind, device=device)
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    return wrap(model, name, None, open_clip.get_model_config(name), precision=kind, device=device)


def _embed(clip: Clip, images: list[bytes], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    preprocess = Preprocess(clip.identity.preprocessing)
    pixels = torch.stack([preprocess(data) for data in images])
    return clip.encode_images(pixels).double().cpu(), clip.encode_texts(texts).double().cpu()
