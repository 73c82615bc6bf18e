"""Which image a name means: against a plain search for the longest end, and how little memory it takes."""

from __future__ import annotations

import errno
import tracemalloc
from array import array
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm.errors import StoreError
from dimefm.exchange import match_names
from dimefm.exchange.match_names import WHOLE, match, stem
from dimefm.sources.base import ImageSample

TAR = "/data/0.tar"


def in_tar(*keys: str) -> list[ImageSample]:
    return [ImageSample(key, TAR, 512 * place, 9) for place, key in enumerate(keys)]


def in_folder(root: str, *paths: str) -> list[ImageSample]:
    return [ImageSample(path.rpartition(".")[0], f"{root}/{path}", 0, 9) for path in paths]


def found(names: list[str], images: list[ImageSample], **words: Any) -> list[tuple[int, int]]:
    """Image and equal parts of each name."""
    matches = match(names, images, **words)
    return list(zip(matches.image_N.tolist(), matches.parts_N.tolist(), strict=True))


NONE, SEVERAL = (-1, 0), (-2, 0)


@pytest.mark.parametrize("name", ["cat/00000.jpg", "cat/00000", "cat/00000.JPEG", "/cat/00000.png", "./cat/00000"])
def test_a_name_is_a_key_with_the_extension_of_an_image_or_without(name: str) -> None:
    assert found([name], in_tar("cat/00000", "dog/00000")) == [(0, WHOLE)]


def test_the_longest_end_decides() -> None:
    images = in_tar("a/x/1", "b/x/1", "b/y/1", "2")
    names = ["/there/a/x/1.jpg", "/there/b/x/1.jpg", "c/y/1.jpg", "there/2.jpg", "c/z/1.jpg", "c/x/1.jpg", "3"]
    assert found(names, images) == [(0, 3), (1, 3), (2, 2), (3, 1), SEVERAL, SEVERAL, NONE]


def test_the_same_number_in_another_set_is_the_weakest_match_or_none() -> None:
    """Numbers of one set are in the other too: what is called matched says by how little."""
    assert found(["cc3m/05009"], in_tar("cc3m/05009", "sbu/05009")) == [(0, WHOLE)]
    assert found(["cc3m/05009"], in_tar("sbu/05009")) == [(0, 1)]
    assert found(["cc3m/05009"], in_tar("sbu/05009"), least=2) == [NONE]
    assert found(["cc3m/05009", "sbu/05009"], in_tar("sbu/05009")) == [NONE, (0, WHOLE)]
    assert found(["cc3m/05009", "laion/05009"], in_tar("sbu/05009")) == [SEVERAL, SEVERAL]
    assert found(["05009"], in_tar("cc3m/05009", "sbu/05009")) == [SEVERAL]


def test_a_file_of_its_own_is_found_by_its_path_too() -> None:
    images = in_folder("/data/cat", "1.jpg", "1.png") + in_folder("/data/dog", "1.jpg")
    names = ["/data/cat/1.jpg", "/other/cat/1.png", "/other/dog/1", "elsewhere/data/dog/1.webp", "/other/cat/1.webp"]
    assert found(names[:3], images) == [(0, WHOLE), (1, 2), (2, 2)]
    assert found(names[3:], images) == [(2, 3), SEVERAL]
    assert found(["1"], images) == [SEVERAL]


def test_a_key_or_a_name_that_comes_twice_means_nothing() -> None:
    assert found(["a/1", "a/2"], in_tar("a/1", "a/1", "a/2")) == [SEVERAL, (2, WHOLE)]
    matches = match(["a/1", "a/2", "a/1"], in_tar("a/1", "a/2"))
    assert matches.image_N.tolist() == [-2, 1, -2]
    assert (matches.ambiguous().tolist(), matches.repeated) == ([0, 2], 1)


def test_without_images_or_names() -> None:
    matches = match(["a", "b", "a"], [])
    assert (matches.image_N.tolist(), matches.repeated, matches.kinds()) == ([-1] * 3, 1, [])
    assert matches.place(0) == ("", 0, 0)
    assert len(matches.sample(8)) == 0
    assert len(match([], in_tar("a")).image_N) == 0


def test_kinds_are_counted_and_the_weakest_is_sampled_first() -> None:
    images = in_tar(*(f"a/b/{i}" for i in range(100)), *(f"c/d/{i}" for i in range(100, 110)), "e/f/999")
    names = [*(f"a/b/{i}" for i in range(100)), *(f"x/d/{i}.jpg" for i in range(100, 110)), "g/999"]
    matches = match(names, images)
    assert matches.kinds() == [
        (WHOLE, "the whole key or path", 100),
        (2, "the last 2 parts", 10),
        (1, "the last part alone", 1),
    ]
    assert matches.sample(4).tolist() == [110, 100, 104, 109]
    assert len(matches.sample(1000)) == 111
    assert matches.sample(0).tolist() == []
    assert matches.place(110) == (TAR, 512 * 110, 9)
    assert matches.first == ("a/b/0", "a/b/0")


def plain(names: list[str], images: list[ImageSample]) -> list[tuple[int, int]]:
    """The docstring of `match`, in words of Python."""

    def parts(name: str, extension: bool) -> list[str]:
        *folders, last = [part for part in name.split("/") if part]
        return [*folders, last if extension else stem(last)]

    def level(name: str, image: ImageSample) -> tuple[int, bool]:
        """How well they match."""
        own = [image.key, image.file] if image.file.endswith((".jpg", ".png")) else [image.key]
        best = (0, False)
        for other, extension in product(own, (False, True)):
            if extension and stem(name.rpartition("/")[2]) == name.rpartition("/")[2]:
                continue  # it has none
            mine, theirs = parts(name, extension), parts(other, extension)
            count = 0
            while count < min(len(mine), len(theirs)) and mine[-1 - count] == theirs[-1 - count]:
                count += 1
            best = max(best, (WHOLE if mine == theirs else count, extension if count else False))
        return best

    choices = []
    for name in names:
        levels = [level(name, image) for image in images]
        top = max(levels, default=(0, False))
        choices.append(([i for i, one in enumerate(levels) if one == top] if top[0] else [], top))
    result = []
    for those, top in choices:
        rivals = [other for others, other in choices if others == those]
        if len(those) > 1 or (len(those) == 1 and max(rivals) == top and rivals.count(top) > 1):
            result.append(SEVERAL)
        elif not those or max(rivals) > top:
            result.append(NONE)
        else:
            result.append((those[0], top[0]))
    return result


NAMES = st.builds(
    lambda folders, last, extension: "/".join([*folders, last]) + extension,
    st.lists(st.sampled_from("ab"), max_size=3),
    st.sampled_from(["1", "2"]),
    st.sampled_from(["", ".jpg", ".png"]),
)


@given(st.lists(NAMES, max_size=6), st.lists(NAMES, max_size=6), st.booleans())
@settings(deadline=None, max_examples=60)
def test_matches_are_those_of_a_plain_search(names: list[str], others: list[str], folder: bool) -> None:
    images = in_tar(*others)
    if folder:
        images = in_folder("/r", *(name if "." in name else f"{name}.jpg" for name in others))
    assert found(names, images) == plain(names, images)


def test_entries_that_do_not_fit_into_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"/x/{i % 7}/{i // 7}.jpg" for i in range(300)]
    images = in_tar(*(f"{i % 7}/{i // 7}" for i in range(5, 310)))
    whole = found(names, images)
    monkeypatch.setattr(match_names, "_PENDING", 10)
    assert found(names, images) == whole
    assert whole[5:] == [(i - 5, 2) for i in range(5, 300)]


def test_a_full_disk_says_where_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(array):  # type: ignore[type-arg]
        def tofile(self, file: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(match_names, "array", Full)
    with pytest.raises(StoreError, match="No space left on device") as caught:
        match(["a"], in_tar("a"))
    assert "TMPDIR" in str(caught.value)


def test_memory_is_a_few_numbers_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length of the names."""
    count = 10_000

    def names() -> Iterator[str]:
        return (f"{'long' * 30}/{i:09d}.jpg" for i in range(count))

    def images() -> Iterator[ImageSample]:
        return (ImageSample(f"{i:09d}", TAR, i, 9) for i in range(count))

    monkeypatch.setattr(match_names, "_PENDING", 100)
    match(["a"], in_tar("a"))
    tracemalloc.start()
    try:
        matches = match(names(), images())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (matches.image_N == np.arange(count)).all()
    assert peak < 110 * count


def test_paths_of_windows_are_paths() -> None:
    assert found(["D:\\a\\x\\1.jpg", "b\\y\\2"], in_tar("x/1", "b/y/2")) == [(0, 2), (1, WHOLE)]
