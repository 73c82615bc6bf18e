"""Tokens are those of open_clip's own tokenizer, and no text, however long or odd, takes more than a moment."""

from __future__ import annotations

import html
import random
import re
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from dimefm.models import tokenizer as module
from dimefm.models.clip import Clip
from dimefm.models.tokenizer import FastTokenizer, cuts, fast_tokenizer, join_pairs
from dimefm.sample.archive import read_lines

THEIRS = SimpleTokenizer()
SHORT = SimpleTokenizer(context_length=12)
PAIRS = [(tokenizer, FastTokenizer(tokenizer)) for tokenizer in (THEIRS, SHORT)]


def assert_same(texts: list[str]) -> None:
    for theirs, ours in PAIRS:
        expected_BL, found_BL = theirs(texts), ours(texts)
        assert found_BL.dtype == expected_BL.dtype
        different = (found_BL != expected_BL).any(dim=1).nonzero()[:, 0].tolist()
        assert not different, [texts[i] for i in different[:3]]


# -- ordinary sentences -----------------------------------------------------------------------------------------------


def test_the_samples_sentences_have_the_tokens_of_open_clip(sample: Path) -> None:
    for path in sorted((sample / "texts").glob("*.gz")):
        lines = read_lines(path)
        assert_same(lines[::60] + [line for line in lines if not line.isascii()][:40])


@pytest.mark.slow
def test_all_of_the_samples_sentences_have_the_tokens_of_open_clip(sample: Path) -> None:
    for path in sorted((sample / "texts").glob("*.gz")):
        lines = read_lines(path)
        assert torch.equal(PAIRS[0][1](lines), THEIRS(lines))


def test_captions_of_many_sentences_have_the_tokens_of_open_clip(sample: Path) -> None:
    lines = read_lines(sample / "texts" / "visual_gcc_validation.txt.gz")[:600]
    assert_same([" ".join(lines[at : at + 12]) for at in range(0, len(lines), 12)])


def test_no_texts_are_no_tokens() -> None:
    for theirs, ours in PAIRS:
        assert torch.equal(ours([]), theirs([]))


def test_words_seen_before_and_words_forgotten_have_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a dog and a cat", "two unforgettably counterintuitive dogs", "a cat"]
    expected_BL, monkeyed = THEIRS(texts * 2), FastTokenizer(THEIRS)
    monkeypatch.setattr(module, "_MOST_WORDS", 3)
    assert torch.equal(monkeyed(texts * 2), expected_BL)
    assert len(monkeyed._tokens_of.__self__) <= 3  # type: ignore[attr-defined]


def test_a_clip_tokenizes_by_it(clip: Clip) -> None:
    texts = ["a photo of a dog", "Café &amp; bar", ""]
    assert isinstance(clip._tokenize, FastTokenizer)
    assert torch.equal(clip.tokenize(texts), clip.tokenizer(texts))


@pytest.mark.parametrize("options", [{"clean": "whitespace"}, {"clean": "canonicalize"}, {"reduction_mask": "simple"}])
def test_a_tokenizer_of_another_kind_stays_as_it_is(options: dict[str, str]) -> None:
    other = SimpleTokenizer(**options)
    assert fast_tokenizer(other) is other


def test_what_is_no_simple_tokenizer_stays_as_it_is() -> None:
    class Other(SimpleTokenizer):
        pass

    other = Other()
    assert fast_tokenizer(other) is other
    assert isinstance(fast_tokenizer(open_clip.get_tokenizer("ViT-B-32")), FastTokenizer)


# -- odd ones ---------------------------------------------------------------------------------------------------------

ODD = [
    *("", " ", "\t\n", "\x1c\x1f", "\x00", "\x0b", "\x85", "\u3000", "\xa0", "\ufeff", "\r\n", "\u2028", "\x1b[31m"),
    *("'s", "don't", "'LL", "'ſ", "'", "''s", "<start_of_text>", "<END_OF_TEXT> x", "<ſtart_of_text>", "<|endoftext|>"),
    *("&amp;", "&amp;amp;lt;", "<&amp;amp;", "&eacute", "&NTILDE;", "&#8217;", "&#x1F600;", "&#57;", "AT&T", "& ;"),
    *("İstanbul", "Straße", "ẞ", "ﬁne", "ŉ", "Ǆ", "ı", "K", "\u0301", "e\u0301\u0323", "½ ² Ⅷ ① ١٢", "2024 3.14"),
    *(
        "漢字かな",
        "한국어",
        "ｆｕｌｌ　ｗｉｄｔｈ",
        "＆amp;amp;",
        "ﾃｽﾄ",
        "👨‍👩‍👧 🇺🇸",
        "😂" * 9,
        "“curly” ‘quotes’",
        "– — …",
    ),
    *(
        "cafÃ©",
        "â€™s",
        "â€œquotedâ€\x9d",
        "Ã la mode",
        "voilÃ ",
        "Â£5",
        "Ñ„Ð¸Ð»ÑŒÐ¼",
        "caf\xe9\x92s",
        "\ud83d\ude00",
        "\ud83d",
    ),
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_an_odd_text_has_the_tokens_of_open_clip(text: str) -> None:
    assert_same([text, f"a {text} b", f"a{text}b", text.upper()])


_bytes = st.tuples(st.binary(max_size=60), st.sampled_from(["utf-8", "latin-1", "cp1252", "cp1251", "utf-16", "cp437"]))
_decoded = _bytes.map(lambda pair: pair[0].decode(pair[1], "replace"))
_mojibake = st.tuples(st.text(max_size=30), st.sampled_from(["latin-1", "cp1252", "cp1251", "macroman"])).map(
    lambda pair: pair[0].encode("utf-8", "replace").decode(pair[1], "replace")
)
_ascii = st.text(st.characters(min_codepoint=0, max_codepoint=127), max_size=200)
_entity = st.sampled_from(sorted(html.entities.html5)).map("&{}".format)
_mixed = st.lists(st.one_of(st.sampled_from(ODD), _entity, st.text(max_size=4)), max_size=20).map("".join)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.text(), _decoded, _mojibake, _ascii, _mixed), min_size=4, max_size=8))
def test_any_text_has_the_tokens_of_open_clip(texts: list[str]) -> None:
    assert_same(texts)


# -- long ones --------------------------------------------------------------------------------------------------------

_rng = random.Random(0)
LETTERS = "".join(_rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(3000))
LONG = {
    "letters": LETTERS,
    "one letter": "a" * 3000,
    "repeated": "haha" * 750,
    "marks": "-" * 3000,
    "digits": "7" * 3000,
    "endings": "'s" * 1500,
    "words": "dog " * 3000,
    "blanks": " " * 3000 + "dog",
    "blanks and tabs": " \t\n" * 1000 + "dog",
    "accents": "Le café de l’église. " * 150,
    "mojibake": "Le cafÃ© de lâ€™Ã©glise. " * 120,
    "characters": "漢字" * 1500,
    "emoji": "😂" * 500,
    "combining": "a" + "\u0301\u0323" * 1000,
    "entities": "&" + "amp;" * 700,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_has_the_tokens_of_open_clip(name: str) -> None:
    assert_same([LONG[name], f"a photo of {LONG[name]}"])


HUGE = {
    **{name: text * (300_000 // len(text)) for name, text in LONG.items()},
    "entities": "&" + "amp;" * 75_000,
    "combining": "a" + "\u0301\u0323" * 150_000,
    "number": "&#" + "9" * 300_000,
    "zeros": "&#" + "0" * 300_000 + "65;",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_text_of_three_hundred_thousand_characters_takes_a_moment(name: str) -> None:
    """Here some 10 ms, 150 at most; open_clip takes minutes for some of them, and fails at the numbers."""
    began = time.process_time()
    assert PAIRS[0][1]([HUGE[name]])[0, 0] == THEIRS.sot_token_id
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", ["words", "digits", "endings", "blanks", "letters"])
def test_plain_text_is_exact_at_any_length(name: str) -> None:
    """open_clip's cleaning takes no time for these; a word of letters is cut to what it can do."""
    assert_same([LONG[name] * (1 if name == "letters" else 40) + " end"])


def test_only_the_first_words_of_a_long_text_that_is_not_plain_are_looked_at() -> None:
    first = "Le café de l’église est fermé. " * 130
    theirs, ours = PAIRS[0]
    assert torch.equal(ours([first + "&amp;" * 90_000]), theirs([first]))
    assert torch.equal(ours([first + "é" * 90_000]), theirs([first]))


# -- byte-pair encoding -----------------------------------------------------------------------------------------------


def _toy(rng: random.Random, letters: str) -> Any:
    """What a SimpleTokenizer knows, of a few letters and pairs of random ranks; tokens are at most four letters."""
    ends = [f"{letter}</w>" for letter in letters]
    tokens, pairs = [*letters, *ends], []
    for _ in range(30):
        left, right = rng.choice(tokens), rng.choice(tokens)
        joined = left + right
        if "</w>" not in left and len(joined.removesuffix("</w>")) <= 4 and (left, right) not in pairs:
            pairs.append((left, right))
            tokens += [] if joined in tokens else [joined]
    rng.shuffle(pairs)
    return SimpleNamespace(
        pat=re.compile(r"\S+"),
        byte_encoder={ord(letter): letter for letter in letters},
        encoder={token: place for place, token in enumerate(tokens)},
        decoder=dict(enumerate(tokens)),
        all_special_ids=[],
        bpe_ranks={pair: rank for rank, pair in enumerate(pairs)},
        cache={},
    )


def test_pairs_are_joined_as_by_open_clip_whatever_their_ranks() -> None:
    rng = random.Random(1)
    for _ in range(300):
        toy = _toy(rng, "abc")
        for _ in range(10):
            letters = [rng.choice("abc") for _ in range(rng.randrange(1, 30))]
            expected = SimpleTokenizer.bpe(toy, "".join(letters)).split(" ")
            assert join_pairs([*letters[:-1], f"{letters[-1]}</w>"], toy.bpe_ranks) == expected


def test_the_first_tokens_of_a_long_word_are_those_of_the_whole_word() -> None:
    rng = random.Random(2)
    for _ in range(300):
        toy = _toy(rng, "abc")
        words = module._Words(toy, room=3)
        for _ in range(10):
            unit = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 60)))
            word = (unit * 60)[: rng.randrange(30, 60)]
            expected = [toy.encoder[token] for token in SimpleTokenizer.bpe(toy, word).split(" ")]
            assert words[word] == module._packed(expected[:3])
            assert words._first_tokens(list(word[:28])) is not None  # they were found from its beginning


def test_a_word_whose_beginning_depends_on_its_end_is_looked_at_whole() -> None:
    """Each pair of neighbours in the alphabet is joined before the one to its left: from the end on, two by two."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(left, right + end) for left, right in pairwise(letters) for end in ("", "</w>")][::-1]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
    toy = _toy(random.Random(0), letters)
    toy.bpe_ranks, toy.encoder = {pair: rank for rank, pair in enumerate(pairs)}, {t: i for i, t in enumerate(tokens)}
    words = module._Words(toy, room=3)
    for word, first in ((letters, ["ab", "cd", "ef"]), (letters[:-1], ["a", "bc", "de"])):
        assert SimpleTokenizer.bpe(toy, word).split(" ")[:3] == first
        assert words[word] == module._packed([toy.encoder[token] for token in first])


def test_a_text_is_cut_where_it_has_more_tokens_than_the_context() -> None:
    tokenizer = SimpleTokenizer(context_length=8)
    is_cut = cuts(tokenizer)
    assert is_cut is not None
    assert [is_cut(" ".join(["cat"] * words)) for words in (0, 1, 5, 6, 7, 8, 50)] == [False] * 4 + [True] * 3
    assert not is_cut("a cat in a cat")
    assert is_cut("\u732b" * 8), "each of these letters is a token or more"
    assert not is_cut("\u732b")
    assert is_cut("unbelievablestuffinoneword" * 3), "one word may have many tokens"


def test_of_a_tokenizer_of_another_kind_it_is_not_known_what_it_cuts() -> None:
    assert cuts(lambda texts: texts) is None
