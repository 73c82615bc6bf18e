"""Sets with planted copies of what is trained on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dimefm.evaluation.config import EvaluationConfig, choose_sets
from dimefm.leaks.find_leaks import LeaksConfig, find_leaks
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from tests.making import make_jpeg, read_tar, write_tar

COPIED = 6


def write_test_set(folder: Path, image_tar: Path, cifar10: str) -> list[str]:
    """Two classes of 12 images: six are copies of training images, the others are of another set. And the keys of the
    training images that were copied."""
    trained = read_tar(image_tar, 96)
    keys = sorted(trained)[: 8 * COPIED : 8]
    members = sorted(read_tar(next(Path(cifar10).rglob("*.tar")), 120).items())
    others = iter([data for name, data in members if name.endswith((".jpg", ".jpeg"))])
    for number, key in enumerate(keys):
        image = Image.open(io.BytesIO(trained[key]), formats=["JPEG"]).convert("RGB")
        if number % 3 == 1:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if number % 3 == 2:
            image = image.crop((0, 0, int(0.85 * image.width), int(0.85 * image.height)))
        place = folder / "test" / f"class {number % 2}" / f"copy{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place, quality=80)
    for number in range(18):
        place = folder / "test" / f"class {number % 2}" / f"other{number}.jpg"
        place.write_bytes(next(others))
    return [key.rpartition(".")[0] for key in keys]


def write_captions(folder: Path, text_store: Store) -> set[int]:
    """A set of six images with two captions each, of which three are sentences of the store: as it is, in capitals,
    and with another word; and the rows of these sentences."""
    texts = [one["text"] for one in text_store.samples(np.arange(text_store.schema.rows))]
    long = [row for row, text in enumerate(texts) if len(text.split()) >= 12][:3]
    words = texts[long[2]].split()
    planted = [texts[long[0]], texts[long[1]].upper() + " !", " ".join([*words[:3], "zeppelin", *words[4:]])]
    members: dict[str, bytes] = {}
    for number in range(6):
        lines = [f"a zebra number {number} that nobody has described", f"quite another caption, {number}"]
        if number < 3:
            lines[number % 2] = planted[number]
        members[f"image{number}.jpg"] = make_jpeg(seed=number)
        members[f"image{number}.txt"] = "\n".join(lines).encode()
    folder.mkdir()
    write_tar(folder / "test-0.tar", members)
    return set(long)


def run(store: Store, folder: Path | list[Path], out: Path, clip: Clip, **changes: Any) -> Any:
    """Every pair is looked at: the embeddings of the tiny teacher mean nothing."""
    folders = tuple(map(str, folder if isinstance(folder, list) else [folder]))
    chosen = choose_sets(EvaluationConfig(model="", folders=folders))
    fields = {"cosine": -1.0, "nearest": 200, **changes}
    return find_leaks(LeaksConfig(store=store.path, out=str(out), **fields), chosen, None, lambda _: clip, "cpu")
