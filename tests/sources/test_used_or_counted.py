"""Random trees of random good and bad files: what is used and what is counted are together all that there is."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.sentences import SentenceRules, tidy
from dimefm.errors import SourceError
from dimefm.inspection.info import describe
from dimefm.models.clip import Clip
from dimefm.sources.account import Account, describe_skipped
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.text_sources import open_text_source
from tests.making import encoded, make_jpeg, picture, write_parquet, write_tar, write_tsv

TREES = 200
JPEG, PNG = make_jpeg((8, 8)), encoded(picture((8, 8)), "PNG")
Maker = Callable[[random.Random, Path, str], int]
"""Puts something into a folder under a name of its own; how many things are in it that can be used or counted."""


def _image(rng: random.Random, folder: Path, name: str) -> int:
    data = rng.choice([JPEG, PNG, b"", b"no image", JPEG[:200]])
    (folder / f"{name}.{rng.choice(['jpg', 'JPEG', 'png', 'webp', 'TIFF', 'avif', 'heic', 'jp2'])}").write_bytes(data)
    return 1


def _without_a_name(rng: random.Random, folder: Path, name: str) -> int:
    (folder / rng.choice([name, f"{name}.2019", f"{name}.jpg?w=1"])).write_bytes(rng.choice([JPEG, b"", b"text"]))
    return 1


def _other(rng: random.Random, folder: Path, name: str) -> int:
    ending = rng.choice([".txt", ".json", ".mp4", ".svg", ".tar.gz", ".tgz", ".csv", ".PARQUET"])
    (folder / f"{rng.choice(['', '', '.', '._'])}{name}{ending}").write_bytes(rng.choice([b"", b"x", JPEG]))
    return 1


def _hidden_folder(rng: random.Random, folder: Path, name: str) -> int:
    (folder / f".{name}").mkdir()
    for number in range(rng.randrange(3)):
        (folder / f".{name}" / f"{number}.jpg").write_bytes(JPEG)
    return 1


def _link(rng: random.Random, folder: Path, name: str) -> int:
    """To a file that is there or not, to itself, or to a folder above."""
    far = folder / "a file.md"
    kept = not far.exists()
    far.write_bytes(b"x")
    target = rng.choice([far, folder / f"{name} is gone", f"{name}.jpg", ".", "..", folder.resolve()])
    (folder / f"{name}.jpg").symlink_to(target)
    return 1 + kept


def _linked_folder(rng: random.Random, folder: Path, name: str) -> int:
    far = folder / f".{name}"
    far.mkdir()
    count = rng.randrange(3)
    for number in range(count):
        (far / f"{number}.jpg").write_bytes(JPEG)
    (folder / name).symlink_to(far)
    return 1 + count


def _special(rng: random.Random, folder: Path, name: str) -> int:
    if rng.random() < 0.5:
        os.mkfifo(folder / f"{name}.jpg")
    else:
        Path(os.fsdecode(os.fsencode(folder / name) + rng.choice([b"\xff.jpg", b"\xe9"]))).write_bytes(JPEG)
    return 1


def _tar(rng: random.Random, folder: Path, name: str) -> int:
    endings = ["jpg", "png", "txt", "json", "left.jpg", "cls", "webp"]
    names = {
        f"{rng.choice(['', '', '.', 'd/'])}{number // 2}.{rng.choice(endings)}" for number in range(rng.randrange(6))
    }
    write_tar(folder / f"{name}.tar", {one: rng.choice([JPEG, b""]) for one in sorted(names)})
    if rng.random() < 0.5:
        (folder / f"{name}.parquet").write_bytes(b"captions")
        return len(names or [name]) + 1
    return len(names or [name])  # an empty one is counted itself


def _parquet(rng: random.Random, folder: Path, name: str) -> int:
    count = rng.randrange(1, 4)
    column = rng.choice(["image", "jpg", "caption"])
    values = (
        ["a caption"] * count if column == "caption" else [rng.choice([JPEG, None, b"x"]) for _ in range(count - 1)]
    )
    rows = [{column: value} for value in [*values, *([JPEG] if column != "caption" else [])]]
    write_parquet(folder / f"{name}.parquet", rows)
    return 1 if column == "caption" else count


def _tsv(rng: random.Random, folder: Path, name: str) -> int:
    if rng.random() < 0.4:
        (folder / f"{name}.tsv").write_text("caption\turl\na cat\thttp://cat\n")
        return 1
    images = {str(number): rng.choice([JPEG, bytes(500)]) for number in range(rng.randrange(1, 4))}
    write_tsv(folder / f"{name}.tsv", images)
    return len(images)


def _garbage(rng: random.Random, folder: Path, name: str) -> int:
    data = rng.choice(
        [b"no archive", b"\x1f\x8b" + bytes(600), b"version https://git-lfs.github.com/spec/v1\nx", b"PAR1"]
    )
    (folder / f"{name}.{rng.choice(['tar', 'parquet'])}").write_bytes(data)
    return 1


MAKERS: list[Maker] = [
    *(_image, _image, _image, _without_a_name, _other, _other, _hidden_folder, _link, _linked_folder, _special),
    *(_tar, _parquet, _tsv, _garbage),
]


def tree(rng: random.Random, folder: Path, depth: int = 0) -> int:
    """A random tree in `folder`; how much is in it."""
    folder.mkdir(parents=True)
    count = 0
    for number in range(rng.randrange(1, 7)):
        if depth < 2 and rng.random() < 0.25:
            count += tree(rng, folder / f"{number} folder", depth + 1)
        else:
            count += rng.choice(MAKERS)(rng, folder, str(number))
    return count


def _line(rng: random.Random) -> str:
    return rng.choice(
        ["a cat", "two dogs", f"sentence {rng.random()}", "", "  ", "\u200b", "a\0b", "x", "日本語の文", "é" * 200]
    )


def _txt(rng: random.Random, path: Path) -> int:
    lines = [_line(rng) for _ in range(rng.randrange(1, 9))]
    path.write_text("\n".join(lines) + "\n", encoding=rng.choice(["utf-8", "utf-8-sig", "utf-16"]))
    return len(lines)


def _jsonl(rng: random.Random, path: Path) -> int:
    lines, count = [json.dumps({"text": "the first"})], 1
    for _ in range(rng.randrange(8)):
        captions = [_line(rng) for _ in range(rng.randrange(1, 4))]
        value = rng.choice(
            [{"text": _line(rng)}, {"text": captions}, {"text": None}, {"other": 1}, {"text": 3}, [], "x", ""]
        )
        lines.append(json.dumps(value) if value != "" else rng.choice(["", "{", "no JSON"]))
        count += len(captions) if value == {"text": captions} else 1
    path.write_text("\n".join(lines) + "\n")
    return count


def _csv(rng: random.Random, path: Path) -> int:
    rows = [["1", "a cat"], *([str(i), _line(rng).replace("\0", "")] for i in range(rng.randrange(6)))]
    rows += [["short"] for _ in range(rng.randrange(2))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *rows])
    return len(rows)


def _texts_parquet(rng: random.Random, path: Path) -> int:
    rows = [{"text": rng.choice([_line(rng), None])} for _ in range(rng.randrange(1, 6))]
    write_parquet(path, [{"text": "the first"}, *rows])
    return 1 + len(rows)


def _texts_tar(rng: random.Random, path: Path) -> int:
    members = {
        f"{number}.{rng.choice(['txt', 'jpg', 'json'])}": _line(rng).encode() for number in range(rng.randrange(5))
    }
    write_tar(path, members)
    return len(members) or 1


TEXTS = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _texts_parquet, ".tar": _texts_tar}


def text_tree(rng: random.Random, folder: Path) -> int:
    """A random tree of sentences in files of one kind, among others; how much is in it."""
    ending = rng.choice([*TEXTS])
    count = 0
    for number in range(rng.randrange(1, 5)):
        place = folder / rng.choice(["", "a", "a/b"])
        place.mkdir(parents=True, exist_ok=True)
        if rng.random() < 0.2:
            (place / f"{number}{ending}").write_bytes(rng.choice([b"\x1f\x8b" + bytes(99), b"PK\x03\x04" + bytes(99)]))
            count += 1
        else:
            count += TEXTS[ending](rng, place / f"{number}{ending}")
        if rng.random() < 0.5:
            (place / f"{rng.choice(['', '.'])}{number}.jpg").write_bytes(JPEG)
            count += 1
    return count


def test_sentences_used_and_counted_are_all(tmp_path: Path) -> None:
    planned = 0
    for seed in range(TREES):
        rng, account, used = random.Random(seed), Account(), 0
        total = text_tree(rng, tmp_path / f"{seed}")
        rules = SentenceRules(min_words=rng.choice([None, 2]), max_words=rng.choice([None, 50]))
        with suppress(SourceError):
            source = open_text_source([str(tmp_path / f"{seed}")], account=account)
            used = len(list(tidy(source, rules, account)))
        counted = sum(one.count for one in account.skipped())
        assert used + counted + len(account.problems) == total, (seed, used, account.lines())
        planned += used > 0
    assert planned > TREES / 2


def used_and_counted(folder: Path, captions: str | None = None) -> tuple[int, Account]:
    """The images of a folder, none where it has none, and the account of the rest."""
    account = Account()
    with suppress(SourceError):
        source = open_image_source([str(folder)], account=account, captions=captions)
        return len(list(source.samples(account))), account
    return 0, account


def test_images_used_and_counted_are_all(tmp_path: Path) -> None:
    """With captions too: none of the text members is one, and they are counted as what they are."""
    planned = 0
    for seed in range(TREES):
        folder = tmp_path / f"{seed}"
        total = tree(random.Random(seed), folder)
        used, account = used_and_counted(folder, captions="txt" if seed % 2 else None)
        counted = sum(one.count for one in account.skipped() if "their images are used" not in one.reason)
        assert used + counted + len(account.problems) == total, (seed, used, account.lines())
        planned += used > 0
    assert planned > TREES / 2


def test_the_plan_holds_what_is_counted(tmp_path: Path, clip: Clip) -> None:
    tree(random.Random(8), tmp_path / "in")
    used, account = used_and_counted(tmp_path / "in")
    request = PlanRequest(kind="image", arguments=(str(tmp_path / "in"),), shard_rows=16, batch_size=4)
    schema = open_or_plan(request, str(tmp_path / "s.zarr"), clip.identity).schema
    assert (schema.rows, schema.source.skipped) == (used, account.skipped())
    assert schema.source.problems == tuple(account.problems)
    shown = " ".join(describe(str(tmp_path / "s.zarr")).split())
    assert used
    assert account.skipped()
    assert all(" ".join(describe_skipped(one).split()) in shown for one in account.skipped())
