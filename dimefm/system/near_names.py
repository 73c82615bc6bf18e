"""What a mistyped name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_LEAST = 3  # letters that say something about a name
_ALIKE = 0.61  # difflib's ratio of names that are alike: `watch` is not like `cache`


def near_names(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that `word` begins or is a part of (`train` of `train-student`), then those that are most like
    it, nearest first; capitals, hyphens and underscores do not count."""
    by_plain: dict[str, list[str]] = {}
    for name in known:
        by_plain.setdefault(_plain(name), []).append(name)
    wanted = _plain(word)
    parts = [name for name in by_plain if name.startswith(wanted) or wanted in name.split("-")]
    near = [*(parts if len(wanted) >= _LEAST else []), *get_close_matches(wanted, by_plain, n=most, cutoff=_ALIKE)]
    return [name for plain in dict.fromkeys(near) for name in by_plain[plain]][:most]


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A remedy for an unknown name: `did you mean 'ViT-B-32' or 'ViT-B-16'?`, or `otherwise` where none is near."""
    near = [repr(name) for name in near_names(word, known)]
    if not near:
        return otherwise
    *first, last = near
    return f"did you mean {', '.join(first)} or {last}?" if first else f"did you mean {last}?"


def did_you_mean_path(path: str, otherwise: str = "", begin: str = "") -> str:
    """A remedy for a local path that leads nowhere: `did you mean 'sets/pets'?`, with what has a name like the first
    part of the path that does not exist, if the rest of the path exists there; else `otherwise`, as for a URL. `begin`
    is put before the paths."""
    parts = Path(path).parts
    wrong = next((i for i in range(len(parts)) if not Path(*parts[: i + 1]).exists()), None)
    if wrong is None or "://" in path:
        return otherwise
    parent, rest = Path(*parts[:wrong]), parts[wrong + 1 :]
    try:
        beside = sorted(one.name for one in parent.iterdir())
    except OSError:
        return otherwise
    near = [parent.joinpath(name, *rest) for name in near_names(parts[wrong], beside)]
    return did_you_mean(f"{begin}{path}", [f"{begin}{one}" for one in near if one.exists()], otherwise)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
