"""Decoding and preprocessing: speed on one core, and agreement with open_clip's own path, pixels and embeddings."""

import click
import numpy as np
import open_clip
import torch

from benchmarks.measure import machine, median, ratio, rounds, table
from dimefm.datasets.own_sets import open_folder
from dimefm.images.decode import decode_pillow, decode_rgb, open_image
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.models.clip import load_clip
from dimefm.sample import sample_dir
from dimefm.sources.read_image import read_encoded


@click.command()
@click.option("--set", "sets", multiple=True, help="Labelled sets to read images from. Default: those of the sample.")
@click.option("--images", default=200, show_default=True, help="Images of each set.")
@click.option("--count", default=7, show_default=True, help="Rounds.")
def preprocessing(sets: tuple[str, ...], images: int, count: int) -> None:
    """Fast decode and preprocess against open_clip's."""
    torch.set_num_threads(1)
    name = f"local-dir:{sample_dir() / 'teacher'}"
    clip = load_clip(name, device="cpu")
    fast, facts = Preprocess(clip.identity.preprocessing), clip.identity.preprocessing
    _, _, theirs = open_clip.create_model_and_transforms(name)
    rows = []
    for path in sets or [str(p) for p in sorted((sample_dir() / "eval").iterdir())]:
        data = [read_encoded(s) for s in open_folder(path).samples[:images]]
        seconds = rounds(
            {
                "open_clip": lambda data=data: [theirs(decode_pillow(d)) for d in data],
                "fast": lambda data=data: [fast(d) for d in data],
                "decode": lambda data=data: [decode_rgb(d) for d in data],
            },
            count,
        )
        mine_B3HW = torch.stack([fast(d) for d in data])
        theirs_B3HW = torch.stack([theirs(decode_pillow(d)) for d in data])
        off = (normalise(mine_B3HW, facts.mean, facts.std) - theirs_B3HW).abs().max() * 255 * facts.std[0]
        with torch.inference_mode():
            reference = torch.cat([clip.model.encode_image(b, normalize=True) for b in theirs_B3HW.split(32)])
        cosine = (torch.cat([clip.encode_images(b) for b in mine_B3HW.split(32)]) * reference).sum(dim=1)
        sizes = np.median([open_image(d).size for d in data], axis=0).astype(int)
        rate = {k: len(data) / median(v) for k, v in seconds.items()}
        rows.append(
            (
                path.rstrip("/").rpartition("/")[2],
                f"{sizes[0]} x {sizes[1]}",
                f"{rate['open_clip']:,.0f}",
                f"{rate['fast']:,.0f}",
                f"{ratio(seconds['open_clip'], seconds['fast']):.2f}",
                f"{rate['decode']:,.0f}",
                f"{off:.1f}",
                f"{cosine.min():.6f}",
            )
        )
    head = ("set", "median size", "open_clip/s", "dimefm/s", "ratio", "decode alone/s", "worst pixel", "worst cosine")
    click.echo(table(head, rows))
    click.echo(f"one core of: {machine()}; {images} images a set, medians of {count} paired rounds, sample teacher")
