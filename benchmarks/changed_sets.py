"""Labelled sets whose images are changed: greyscale, inverted, drawn by their edges, blurred, of low resolution; or all
at once, small, grey and inverted, unlike any image that a student was trained on.

What a student knows of another domain than its training images shows in its share of the teacher's score on these.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

_SHARE = 4  # a low resolution is a quarter of the image's; a blur has a radius of a fortieth of its short side


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / (10 * _SHARE)))


def _small(image: Image.Image) -> Image.Image:
    small = image.resize([max(1, side // _SHARE) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": lambda image: image.convert("L").convert("RGB"),
    "inverted": ImageOps.invert,
    "edges": lambda image: image.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB"),
    "blurred": _blurred,
    "low-resolution": _small,
    "unlike": lambda image: ImageOps.invert(image.convert("L").resize((28, 28))).convert("RGB"),
}


def changed_set(folder: Path, change: str, out: Path) -> Path:
    """The set in `folder`, a WebDataset with classnames.txt and templates.txt, with its images changed, below `out`;
    made once. Returns its folder."""
    target = out / f"{folder.name}-{change}"
    done = target / "classnames.txt"
    if done.exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for source in sorted(folder.glob("*.tar")):
        with tarfile.open(source) as before, tarfile.open(target / source.name, "w") as after:
            for member in before:
                file = before.extractfile(member)
                data = file.read() if file else b""
                stem, _, ending = member.name.rpartition(".")
                if ending in ("jpg", "jpeg", "png"):
                    sink = io.BytesIO()
                    CHANGES[change](Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]).convert("RGB")).save(
                        sink, "PNG"
                    )
                    data, ending = sink.getvalue(), "png"
                info = tarfile.TarInfo(f"{stem}.{ending}")
                info.size = len(data)
                after.addfile(info, io.BytesIO(data))
    for name in ("templates.txt", "classnames.txt"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target
