"""Make the sample's images, sentences, evaluation sets and CLIP text embeddings from the assets folder.

    python -m dimefm.sample.build_sample --assets DIR --out dimefm/sample

Two runs give the same bytes (with the same Pillow). The teacher is made by build_teacher.

The whole sample has to stay within 45 MB, of which the teacher takes half. A tar costs 512 bytes per member and rounds
its data up to 512, so the counts below are chosen by bytes in the archive; `main` prints the size of each part.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image

from dimefm.errors import DimefmError
from dimefm.images.decode import decode_pillow
from dimefm.sample.archive import Sample, read_lines, read_tars, scattered, write_lines, write_tar

LIMIT_BYTES = 45_000_000
IMAGES_PER_TAR = 1000

CALTECH_PER_CLASS, CIFAR_PER_CLASS = 24, 300
CIFAR_TEST_PER_CLASS = 100
CALTECH_SIDE, CALTECH_TEST_SIDE = 80, 112
"""Shorter side in pixels. Fewer images at 80 teach more than all at 64, which the teacher sees differently."""
JPEG_QUALITY = 80
"""At a side of 80 the teacher classifies as many test images correctly at quality 75 as at 85."""

SENTENCES = {
    "visual_coco_val2017": None,
    "visual_gcc_validation": None,
    "mixed_wordnet_glosses": 7_000,
    "mixed_wordnet_examples": 3_000,
    "nonvisual_us_speeches": 10_000,
    "nonvisual_film_reviews": 10_000,
    "nonvisual_product_pros_cons": 10_000,
}
"""The files of sentences and how many lines are taken of each; None for all. Only files with a clean licence."""

EMBEDDED_NAMES = ("imagenet1k", "lvis", "o365", "oid", "coco")
"""Lists of names with real CLIP embeddings. A name in several lists, in any case, has the embedding of the first."""


@click.command()
@click.option("--assets", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
def main(assets: Path, out: Path) -> None:
    """Make everything but the teacher from the folder ASSETS, and print the size of each part."""
    try:
        build_texts(assets / "texts", out / "texts")
        build_embeddings(assets / "teacher/openai_clip_vitb32_text_embeddings.npz", out / "clip_text_embeddings.npz")
        training = build_images(assets / "images", out / "images")
        held_out = build_cifar_test(assets / "eval/cifar10", out / "eval/cifar10")
        held_out |= build_caltech_test(assets / "eval/caltech101", out / "eval/caltech101")
        check_disjoint(training, held_out)
        print_sizes(out)
    except DimefmError as error:
        raise click.ClickException(str(error)) from None


def build_texts(source: Path, out: Path) -> None:
    """Copy the files of SENTENCES. A file that is cut keeps a uniform random sample of its lines, in their order."""
    for name, count in SENTENCES.items():
        lines = read_lines(source / f"{name}.txt.gz")
        kept = set(sorted(lines, key=scattered)[:count])
        write_lines(out / f"{name}.txt.gz", [line for line in lines if line in kept])


def build_embeddings(source: Path, out: Path) -> None:
    """Write the CLIP embeddings of all names, each once. The first 1,000 are ImageNet's, in the order of its classes.

    Arrays: names (N,) unicode, embeddings (N, 512) float16 of unit norm.
    """
    names: list[str] = []
    rows: list[np.ndarray] = []
    seen: set[str] = set()
    with np.load(source) as lists:
        for name_list in EMBEDDED_NAMES:
            for name, embedding in zip(lists[f"{name_list}_names"], lists[name_list], strict=True):
                if name_list == "imagenet1k" or name.lower() not in seen:
                    names.append(str(name))
                    rows.append(embedding)
                seen.add(name.lower())
    np.savez_compressed(out, names=np.array(names), embeddings=np.stack(rows))


def build_images(source: Path, out: Path) -> dict[str, bytes]:
    """Write the unlabelled training images, with both sets mixed in every tar, but those in leaked.txt: `dimefm leaks`
    found near-copies of them in the test sets. Return the bytes of each image by key."""
    leaked = set(Path(__file__).with_name("leaked.txt").read_text(encoding="utf-8").split())
    caltech = first_of_each_class(_keyed("caltech101-*.tar", source, "caltech101"), CALTECH_PER_CLASS)
    cifar = first_of_each_class(_keyed("cifar10-*.tar", source, "cifar10"), CIFAR_PER_CLASS)
    images = {key: smaller(sample["jpg"], CALTECH_SIDE) for key, sample in caltech.items()}
    images |= {key: sample["jpg"] for key, sample in cifar.items()}
    images = {key: jpeg for key, jpeg in images.items() if key not in leaked}
    order = sorted(images, key=scattered)
    for number, start in enumerate(range(0, len(order), IMAGES_PER_TAR)):
        keys = order[start : start + IMAGES_PER_TAR]
        write_tar(out / f"train-{number:05d}.tar", ((key, {"jpg": images[key]}) for key in keys))
    return images


def build_cifar_test(source: Path, out: Path) -> dict[str, bytes]:
    """Write CIFAR-10 test images with their original bytes. Return the bytes of each image by key."""
    samples = first_of_each_class(_keyed("test-*.tar", source, "cifar10"), CIFAR_TEST_PER_CLASS)
    return _write_labelled(source, out, {key: (s["jpg"], s["cls"]) for key, s in samples.items()})


def build_caltech_test(source: Path, out: Path) -> dict[str, bytes]:
    """Write all Caltech-101 test images, made smaller. Return the bytes of each image by key."""
    samples = _keyed("test-*.tar", source, "caltech101")
    labelled = {key: (smaller(s["jpg"], CALTECH_TEST_SIDE), s["cls"]) for key, s in samples}
    return _write_labelled(source, out, labelled)


def _write_labelled(source: Path, out: Path, samples: dict[str, tuple[bytes, bytes]]) -> dict[str, bytes]:
    ordered = sorted(samples, key=scattered)
    members = ((key, {"jpg": samples[key][0], "cls": samples[key][1]}) for key in ordered)
    write_tar(out / "test-00000.tar", members)
    for name in ("classnames.txt", "templates.txt"):
        (out / name).write_bytes((source / name).read_bytes())
    return {key: samples[key][0] for key in ordered}


def _keyed(pattern: str, folder: Path, prefix: str) -> Iterator[tuple[str, Sample]]:
    """The samples, each with the name of its original file as key, such as caltech101/camera/image_0007."""
    for _, sample in read_tars(pattern, folder):
        file = json.loads(sample["json"])["file"]
        yield f"{prefix}/{file.rpartition('.')[0]}", sample


def first_of_each_class(samples: Iterable[tuple[str, Sample]], count: int) -> dict[str, Sample]:
    """The first `count` samples, by name, of each class, which is the folder of the key."""
    by_class: dict[str, list[tuple[str, Sample]]] = defaultdict(list)
    for key, sample in sorted(samples, key=lambda pair: pair[0]):
        by_class[key.rpartition("/")[0]].append((key, sample))
    return dict(pair for pairs in by_class.values() for pair in pairs[:count])


def smaller(jpeg: bytes, side: int) -> bytes:
    """A JPEG encoded again, with a shorter side of at most `side` pixels."""
    image = decode_pillow(jpeg).convert("RGB")
    scale = side / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return encoded.getvalue()


def check_disjoint(training: dict[str, bytes], held_out: dict[str, bytes]) -> None:
    """Raise DimefmError if a test image is also a training image, by original file or by bytes."""
    seen = set(training.values())
    shared = sorted(key for key, jpeg in held_out.items() if key in training or jpeg in seen)
    if shared:
        raise DimefmError(f"{len(shared)} test images are also training images, such as {shared[0]}")


def print_sizes(out: Path) -> None:
    """Print the bytes of every file and their sum. Raises DimefmError above LIMIT_BYTES."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for path in files:
        click.echo(f"{path.stat().st_size:>12,}  {path.relative_to(out)}")
    total = sum(path.stat().st_size for path in files)
    click.echo(f"{total:>12,}  in all")
    if total > LIMIT_BYTES:
        raise DimefmError(f"the sample is {total:,} bytes", remedy=f"take less: the limit is {LIMIT_BYTES:,}")


if __name__ == "__main__":
    main()
