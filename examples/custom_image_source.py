"""Cache and train from images in a place that dimefm does not read by itself: here, a ZIP archive.

    python examples/custom_image_source.py photos.zip IMAGES.zarr local-dir:path/to/teacher

A source lists its files and its samples. A sample says where the bytes of one image are: a file, an offset and a
size. Workers and the trainer read these bytes themselves later, so nothing is copied, and samples are listed only
once, when the plan is made. This suits every container that keeps encoded images whole: ZIP (stored, not deflated),
files of concatenated JPEGs. Images in a container that does not, such as SQLite, are first written to tars or Parquet.
"""

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from dimefm import CacheConfig, cache
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, SourceFile


class ZippedImages:
    """The images of a ZIP archive whose members are stored as they are (`zip -0`)."""

    def __init__(self, path: str) -> None:
        self.path = str(Path(path).resolve())

    def files(self) -> list[SourceFile]:
        """What the plan depends on: a later run refuses to go on if the size or time of a file has changed."""
        found = Path(self.path).stat()
        return [SourceFile(self.path, found.st_size, found.st_mtime_ns)]

    def samples(self, account: Account) -> Iterator[ImageSample]:
        """Every image, always in the same order. Whatever is not used is counted in `account`."""
        with zipfile.ZipFile(self.path) as archive, Path(self.path).open("rb") as raw:
            for member in archive.infolist():
                key, _, extension = member.filename.rpartition(".")
                if extension not in ("jpg", "png") or member.compress_type != zipfile.ZIP_STORED:
                    account.skip("members that are no stored images", member.filename)
                    continue
                raw.seek(member.header_offset + 26)  # the lengths of the name and of the extra field, uint16 each
                name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
                yield ImageSample(key, self.path, member.header_offset + 30 + name + extra, member.file_size)


if __name__ == "__main__":
    archive, out, teacher = sys.argv[1:]
    store = cache(CacheConfig(kind="image", sources=(ZippedImages(archive),), out=out, teacher=teacher))
    print(f"{store.path}: {store.schema.rows} rows, {store.contents.good} with an embedding")
