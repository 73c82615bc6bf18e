"""Image and text retrieval of models on pairs of an image and several captions: tars of key.jpg and key.txt."""

import statistics
from pathlib import Path

import click
import torch

from benchmarks.measure import machine, table
from dimefm import storage
from dimefm.evaluate import open_model
from dimefm.preprocess import Preprocess
from dimefm.sources.images import split_key
from dimefm.sources.tar import tar_members

_DEPTHS = (1, 5, 10)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", required=True, help="Folder of tars: key.jpg, and key.txt with a caption a line.")
@click.option("--group", is_flag=True, help="One line for runs that differ in their last number, the seed.")
def coco_retrieval(models: tuple[str, ...], data: str, group: bool) -> None:
    """R@1, R@5 and R@10 in per cent, image to text and text to image; runs, folders or open_clip names."""
    images, captions, owners = _read(data)
    found: dict[str, list[list[float]]] = {}
    for model in models:
        name = Path(model).name
        name = (name.rpartition("-")[0] if group else "") or name
        with open_model(model, None, "last", "fp32", "cpu") as clip:
            preprocess = Preprocess(clip.identity.preprocessing)
            image_ND = torch.cat([clip.encode_images(preprocess(data)[None]) for data in images])
            text_MD = torch.cat([clip.encode_texts(captions[i : i + 256]) for i in range(0, len(captions), 256)])
        found.setdefault(name, []).append(_recalls(image_ND @ text_MD.T, torch.tensor(owners)))
    head = ("model", *(f"{way} R@{depth}" for way in ("image to text", "text to image") for depth in _DEPTHS))
    rows = [(name, *(_spread(column) for column in zip(*values, strict=True))) for name, values in found.items()]
    click.echo(table(head, rows))
    click.echo(f"{machine()}; {len(images)} images, {len(captions)} captions")


def _read(data: str) -> tuple[list[bytes], list[str], list[int]]:
    images: dict[str, bytes] = {}
    texts: dict[str, list[str]] = {}
    for tar in sorted(Path(data).glob("*.tar")):
        for member in tar_members(str(tar), print):
            key, extension = split_key(member.name)
            content = storage.read_bytes(str(tar), member.offset, member.size)
            if extension == "jpg":
                images[key] = content
            elif extension == "txt":
                texts[key] = content.decode().splitlines()
    keys = list(images)
    pairs = [(caption, place) for place, key in enumerate(keys) for caption in texts[key]]
    return list(images.values()), [caption for caption, _ in pairs], [place for _, place in pairs]


def _recalls(score_NM: torch.Tensor, owner_M: torch.Tensor) -> list[float]:
    """An image counts where any caption of its own is among the first; a caption where its image is."""
    own_NM = owner_M[None] == torch.arange(len(score_NM))[:, None]
    best_N = (~own_NM.gather(1, score_NM.argsort(dim=1, descending=True))).int().cumprod(dim=1).sum(dim=1)
    place_M = own_NM.T.gather(1, score_NM.T.argsort(dim=1, descending=True)).int().argmax(dim=1)
    return [100 * float((places < k).float().mean()) for places in (best_N, place_M) for k in _DEPTHS]


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
