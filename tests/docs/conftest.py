"""A user's folder, for the commands of the pages and for the examples."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.making import read_tar, write_tar


@pytest.fixture(scope="module")
def place(image_tar: Path, text_file: Path, cifar10: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, sentences/, labelled_set/ and cat.jpg, as docs/quickstart.md expects them."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(cifar10, folder / "labelled_set")
    for name in ("images", "sentences"):
        (folder / name).mkdir()
    shutil.copy(text_file, folder / "sentences" / "captions.txt")
    images = read_tar(image_tar, 96)
    write_tar(folder / "images" / "images-00000.tar", dict(list(images.items())[:64]))
    write_tar(folder / "images" / "images-00001.tar", dict(list(images.items())[64:]))
    (folder / "cat.jpg").write_bytes(next(data for name, data in images.items() if name.endswith(".jpg")))
    return folder
