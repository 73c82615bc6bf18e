"""Read and write the sample's archives. The same input always gives the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dimefm.errors import SourceError
from dimefm.sources.base import split_key

Sample = dict[str, bytes]
"""The members of one WebDataset sample: from extension to bytes."""


def read_tars(pattern: str, folder: Path) -> Iterator[tuple[str, Sample]]:
    """Key and members of every sample in the tars of `folder` that match a glob, in the order of the tars' names.

    Raises SourceError if no tar matches.
    """
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise SourceError(f"no file matches {folder / pattern}", remedy="check the name of the folder")
    for path in paths:
        samples: dict[str, Sample] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                data = tar.extractfile(member)
                if data is not None:
                    key, extension = split_key(member.name)
                    samples.setdefault(key, {})[extension] = data.read()
        yield from samples.items()


def write_tar(path: Path, samples: Iterable[tuple[str, Sample]]) -> None:
    """Write a WebDataset tar with fixed owner, mode and times, and the members in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in samples:
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode, member.mtime = len(data), 0o644, 0
                tar.addfile(member, io.BytesIO(data))


def read_lines(path: Path) -> list[str]:
    """The lines of a gzip file in UTF-8."""
    return gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write lines to a gzip file that holds no name and no time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def scattered(name: str) -> bytes:
    """A sort key that puts names into an order that looks random and is the same in every version of Python."""
    return hashlib.sha256(name.encode("utf-8")).digest()
