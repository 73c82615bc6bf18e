"""Sentences through the text tower: padding that does not count is cut, and rows keep their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from cache_schemas.plan import PlannedText, planned_rows
from dimefm.caching.encode_rows import encode_rows
from dimefm.models.clip import Clip, load_clip, token_counts
from dimefm.store.embedding_store import Store

CONTEXT = 32
SENTENCES = [
    "a dog",
    "a photo of a small red house by the sea on a very windy day in the late autumn",
    "two cats",
    "the",
    "a man in a blue shirt who rides a bicycle over an old bridge of stone",
]
SHORT = ["a dog", "two cats", "the"]
MODEL = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESS = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}

Make = Callable[..., Clip]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Loads a small CLIP of random weights; `custom` gives its text tower a module of its own, `scale` makes the
    weights larger than open_clip's first ones, with which all sentences are nearly the same."""

    def build(*, custom: bool = False, precision: Any = "fp32", scale: float = 3.0, **text: Any) -> Clip:
        config = {**MODEL, "text_cfg": {**MODEL["text_cfg"], **text}, "custom_text": custom}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
        torch.manual_seed(0)
        kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        model = kind(**{name: value for name, value in config.items() if name != "custom_text"})
        weights = {n: v * scale if v.ndim > 1 else v for n, v in model.state_dict().items()}
        save_file(weights, tmp_path / "open_clip_model.safetensors")
        return load_clip(f"local-dir:{tmp_path}", precision=precision, device="cpu")

    return build


def whole(clip: Clip, texts: list[str]) -> torch.Tensor:
    """What open_clip gives for the full context length."""
    with torch.inference_mode():
        return F.normalize(clip.model.encode_text(clip.tokenizer(texts)), dim=-1)


def lengths(clip: Clip, texts: list[str]) -> list[int]:
    """Tokens a sentence that the text tower computes when these are encoded; the trial on others comes before."""
    clip.encode_texts(texts)
    seen: list[int] = []
    tower = getattr(clip.model, "text", clip.model)
    handle = tower.token_embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    clip.encode_texts(texts)
    handle.remove()
    return seen


# -- towers that do not look at their padding -------------------------------------------------------------------------


def test_the_samples_teacher_gives_the_same_without_padding(sample_teacher: str) -> None:
    clip = load_clip(sample_teacher, device="cpu")
    for texts in (SHORT, SENTENCES):
        torch.testing.assert_close(clip.encode_texts(texts), whole(clip, texts), atol=1e-5, rtol=0)
    assert lengths(clip, SHORT) == [int(token_counts(clip.tokenize(SHORT)).max())]


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_causal_tower_gives_the_same_without_padding(make: Make, custom: bool, scale: float) -> None:
    clip = make(custom=custom, scale=scale)
    for texts in (SHORT, SENTENCES):
        torch.testing.assert_close(clip.encode_texts(texts), whole(clip, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_causal_tower_computes_no_more_than_the_longest_sentence(make: Make, custom: bool, precision: str) -> None:
    clip = make(custom=custom, precision=precision)
    assert lengths(clip, SHORT) == [5]  # start, two words, end, and one of padding
    assert lengths(clip, SENTENCES) == [22]


@pytest.mark.parametrize("custom", [False, True])
def test_a_sentence_of_the_whole_context_is_encoded_as_it_is(make: Make, custom: bool) -> None:
    clip, texts = make(custom=custom), ["dog " * 100, "a cat"]
    assert lengths(clip, texts) == [CONTEXT]
    torch.testing.assert_close(clip.encode_texts(texts), whole(clip, texts), atol=1e-5, rtol=0)


def test_what_other_sentences_are_beside_it_does_not_change_a_sentence(make: Make) -> None:
    clip = make()
    alone = torch.cat([clip.encode_texts([text]) for text in SENTENCES])
    torch.testing.assert_close(clip.encode_texts(SENTENCES), alone, atol=1e-5, rtol=0)


# -- towers that do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("custom", "text"),
    [
        *((custom, text) for custom in (False, True) for text in ({"pool_type": "last"}, {"no_causal_mask": True})),
        (True, {"embed_cls": True}),
    ],
)
@pytest.mark.parametrize(
    ("scale", "precision"),
    [
        (0.03, "fp32"), (3.0, "bf16"),  # with the first the padding changes an embedding by 1e-3
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [
            (1.0, "fp32"), (3.0, "fp32"), (0.03, "bf16"), (1.0, "bf16")
        ]),
    ],
)  # fmt: skip
def test_a_tower_that_looks_at_its_padding_is_given_all_of_it(
    make: Make, custom: bool, text: dict[str, Any], scale: float, precision: str
) -> None:
    clip = make(custom=custom, scale=scale, precision=precision, **text)
    assert lengths(clip, SHORT) == [CONTEXT]
    if precision == "fp32":
        torch.testing.assert_close(clip.encode_texts(SHORT), whole(clip, SHORT), atol=1e-6, rtol=0)


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_with_one_of_the_padding() -> None:
    start, end = 49406, 49407
    padded_by_zero = [[start, 7, end, 0, 0, 0], [start, 7, 8, 9, end, 0], [start, end, 0, 0, 0, 0]]
    padded_by_end = [[start, 7, end, end, end, end], [start, 7, 8, 9, end, end], [start, end, end, end, end, end]]
    assert token_counts(torch.tensor(padded_by_zero)).tolist() == [4, 6, 3]
    assert token_counts(torch.tensor(padded_by_end)).tolist() == [3, 5, 2]


def test_a_sentence_without_padding_counts_whole() -> None:
    assert token_counts(torch.tensor([[1, 2, 3, 4], [1, 2, 2, 9]])).tolist() == [4, 4]


def test_a_zero_within_a_sentence_is_not_its_end() -> None:
    assert token_counts(torch.tensor([[5, 0, 6, 0, 0]])).tolist() == [4]


def test_a_sentence_of_one_token_alone_counts_one() -> None:
    assert token_counts(torch.tensor([[3, 3, 3]])).tolist() == [1]


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_although_like_lengths_share_a_batch(text_store: Store, clip: Clip) -> None:
    rows = [PlannedText(i, str(i), text) for i, text in enumerate(SENTENCES * 3 + SHORT)]
    data = encode_rows(rows, replace(text_store.schema, batch_size=4), clip)
    expected = whole(clip, [row.text for row in rows]).numpy()
    np.testing.assert_allclose(data.arrays["embedding"].astype(np.float32), expected, atol=1e-3)


def test_batches_are_of_like_lengths(text_store: Store, clip: Clip) -> None:
    seen: list[np.ndarray[Any, Any]] = []

    class Spy:
        device, identity, tokenize = clip.device, clip.identity, staticmethod(clip.tokenize)

        def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
            seen.append(token_counts(tokens_BL))
            return clip.encode_tokens(tokens_BL)

    spy: Any = Spy()
    rows = [PlannedText(i, str(i), text) for i, text in enumerate(SENTENCES * 2)]
    encode_rows(rows, replace(text_store.schema, batch_size=4), spy)
    assert [len(counts) for counts in seen] == [4, 4, 2]
    counts = np.concatenate(seen)
    assert (counts == np.sort(counts)).all()


def test_the_size_of_a_batch_does_not_change_the_embeddings(text_store: Store, clip: Clip) -> None:
    rows = planned_rows(text_store.plan(0))
    found = [
        encode_rows(rows, replace(text_store.schema, batch_size=size), clip).arrays["embedding"].astype(np.float32)
        for size in (1, 5, 64)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-3)
