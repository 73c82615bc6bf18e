"""Errors of storage for a person: a remedy that fits the error, and no path twice."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dimefm.errors import StoreError
from dimefm.system import storage


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room, and run the same command again; what was finished is kept"),
        (errno.EDQUOT, "make room, and"),
        (errno.EACCES, "mend the permissions, or give another place, and"),
        (errno.EROFS, "it is read-only: mend that, or give another place, and"),
        (errno.ENOENT, "no folder can be made there: give another place, and"),
        (errno.ENAMETOOLONG, "give a shorter name, and"),
        (errno.EIO, "check the path, its permissions and that the storage answers, and"),
    ],
)
def test_the_remedy_fits_the_error(number: int, remedy: str) -> None:
    what = f"out cannot be written: {os.strerror(number)}"
    with pytest.raises(StoreError, match=what) as caught, storage.writing_to("out"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value.remedy).startswith(remedy)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a folder")
def test_a_place_where_no_folder_can_be_made() -> None:
    with pytest.raises(StoreError, match=r"/proc/x/y\.json cannot be written: No such file") as caught:
        storage.write_json("/proc/x/y.json", {})
    assert "make room" not in str(caught.value)


def test_an_error_that_is_the_path_alone_does_not_show_it_twice() -> None:
    """As fsspec raises it for a file that is not there."""
    with pytest.raises(FileNotFoundError) as caught, storage.asking("memory://a/b.tar"):
        raise FileNotFoundError("/a/b.tar")
    assert (caught.value.filename, caught.value.strerror) == ("memory://a/b.tar", os.strerror(errno.ENOENT))
    with pytest.raises(OSError, match="the token has expired") as other, storage.asking("memory://a/b.tar"):
        raise PermissionError("the token has expired")
    assert other.value.filename == "memory://a/b.tar"
