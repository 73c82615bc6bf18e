"""`python -m benchmarks.gpu.wheels`: lay out the packages that travel with the repository to a bare machine with a GPU.

That machine has Python 3.12 on Linux x86-64, with torch, torchvision, timm and what they need; it has none of NAMES,
and no network. Needs pip and a package index where it runs, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

NAMES = ("zarr", "numcodecs", "donfig", "google-crc32c", "open_clip_torch", "ftfy", "wcwidth", "simplejpeg")
"""zarr with the two that it needs and the checksum that the store and zarr share; open_clip with ftfy, which cleans its
tokenizer's sentences, and what ftfy needs; the JPEG decoder."""

MOST_WHEELS, MOST = 19 * 2**20, 64 * 2**20  # bytes of the wheels, and of all that travels
_ROOT = Path(__file__).parents[2]
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
              "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")  # fmt: skip


def pinned(constraints: Path) -> dict[str, str]:
    """The versions that this release was tested with, of NAMES. Raises ValueError where one is not pinned."""
    lines = (line.partition("==") for line in constraints.read_text().splitlines())
    versions = {_plain(name): version for name, _, version in lines if version}
    missing = [name for name in NAMES if _plain(name) not in versions]
    if missing:
        raise ValueError(f"{constraints} has no version of {', '.join(missing)}")
    return {name: versions[_plain(name)] for name in NAMES}


def download(versions: dict[str, str], folder: Path) -> None:
    """Download these packages as wheels for that machine, without what they need. Raises CalledProcessError."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    words += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*words, *(f"{name}=={version}" for name, version in versions.items())], check=True)


def wheels(versions: dict[str, str], folder: Path) -> dict[str, Path | None]:
    """The wheel of each package in `folder`, None where there is none of that version."""
    found = {(_plain(path.name.split("-")[0]), path.name.split("-")[1]): path for path in folder.glob("*.whl")}
    return {name: found.get((_plain(name), version)) for name, version in versions.items()}


def repository_bytes() -> int:
    """Bytes of the files that git tracks or would, which is what travels of the repository."""
    words = ["git", "-C", str(_ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split("\0")
    return sum(path.stat().st_size for path in {_ROOT / name for name in names if name} if path.is_file())


def _plain(name: str) -> str:
    """A package's name as all its spellings have it."""
    return re.sub("[-_.]+", "-", name).lower()


def main() -> int:
    """Download, and say what is there; 1 where a wheel is missing or all is too large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("--folder", type=Path, default=_ROOT / "wheels", help="Default: wheels/ of the repository.")
    folder: Path = parser.parse_args().folder
    versions = pinned(_ROOT / "constraints.txt")
    download(versions, folder)
    found = wheels(versions, folder)
    for path in set(folder.glob("*.whl")) - set(found.values()):
        path.unlink()  # of another version: two of a package stop the whole installation
    total = 0
    for name, path in found.items():
        size = path.stat().st_size if path else 0
        total += size
        print(f"{name:<18}{versions[name]:<10}{f'{size / 2**20:6.2f} MiB' if path else 'MISSING'}")
    repository = repository_bytes()
    print(
        f"wheels {total / 2**20:.2f} MiB (at most {MOST_WHEELS / 2**20:.0f}) + repository {repository / 2**20:.2f} MiB"
    )
    print(f"= {(total + repository) / 2**20:.2f} MiB to carry (at most {MOST / 2**20:.0f})")
    return int(None in found.values() or total > MOST_WHEELS or total + repository > MOST)


if __name__ == "__main__":
    sys.exit(main())
