"""A small real set that ships with dimefm: a teacher, images, sentences and two labelled evaluation sets.

SOURCES.md in this folder says where each part comes from, under which licence, and how to make it again.
"""

from __future__ import annotations

from pathlib import Path


def sample_dir() -> Path:
    """The folder that holds teacher/, images/, texts/ and eval/."""
    return Path(__file__).resolve().parent
