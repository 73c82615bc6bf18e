"""The check after writing in words."""

from __future__ import annotations

from dimefm.models.checks import checked


def test_the_figures_of_a_check_are_lines_and_what_is_missing_is_left_out() -> None:
    figures = {"images": 64, "image_cosine": 1 - 2e-7, "texts": 1, "text_cosine": 0.99}
    figures |= {"images/a": 200, "pytorch_top1/a": 0.5, "top1/a": 0.495, "top1/b": 0.4}
    assert checked(figures) == [
        "checked against PyTorch on 64 images, smallest cosine 1 - 2e-07; 1 sentence, smallest cosine 0.99000",
        "top-1 accuracy on 200 images of a: 49.50%, PyTorch 50.00%",
    ]
    assert checked({}) == []
