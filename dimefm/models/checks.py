"""What the check after writing measured, in words: for `export`, the model card and `info`."""

from __future__ import annotations

from collections.abc import Mapping

from dimefm.system.wording import counted


def checked(figures: Mapping[str, float]) -> list[str]:
    """Lines about the figures of `export.check.check`. Of a document by others some may be missing."""
    compared = [
        f"{counted(int(figures[f'{kind}s']), word)}, smallest cosine {_cosine(figures[f'{kind}_cosine'])}"
        for kind, word in (("image", "image"), ("text", "sentence"))
        if {f"{kind}s", f"{kind}_cosine"} <= figures.keys()
    ]
    lines = [f"checked against PyTorch on {'; '.join(compared)}"] if compared else []
    for title in (name.removeprefix("top1/") for name in figures if name.startswith("top1/")):
        if {f"pytorch_top1/{title}", f"images/{title}"} <= figures.keys():
            before, after = figures[f"pytorch_top1/{title}"], figures[f"top1/{title}"]
            images = counted(int(figures[f"images/{title}"]), "image")
            same = "as PyTorch" if after == before else f"PyTorch {100 * before:.2f}%"
            lines.append(f"top-1 accuracy on {images} of {title}: {100 * after:.2f}%, {same}")
    return lines


def _cosine(value: float) -> str:
    """As much as differs from 1, since six digits of nine say nothing."""
    return f"1 - {max(0.0, 1 - value):.0e}" if value > 0.9999 else f"{value:.5f}"
