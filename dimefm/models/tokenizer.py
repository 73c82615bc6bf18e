"""Sentences to tokens: the same as open_clip's SimpleTokenizer gives, many times faster.

SimpleTokenizer mends every sentence with ftfy, unescapes HTML, collapses white space, lowers the case, cuts words into
pieces by a pattern and joins the letters of each piece by byte-pair encoding (BPE). Three facts save nearly all of it:

- No piece crosses white space. So a word always has the same tokens: these are kept, and those of a sentence are those
  of its words.
- Each word has at least one token. So no more words than the context has places need to be looked at.
- On printable ASCII without "&", ftfy and the unescaping do nothing.

Any other text is cleaned by open_clip's own function. Shapes: B sentences, L tokens of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, canonicalize_text, get_clean_fn

from dimefm.errors import TeacherError

_MOST_CLEANED = 4096  # characters; cleaning some texts takes quadratic time, and numbers of 4,300 digits fail
_MOST_WORDS, _LONGEST_WORD = 2**18, 64  # that are kept: about 50 MB
_END = "</w>"  # follows the last letter of a piece; a letter is a byte of its UTF-8


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a model, by open_clip's name of the model. Raises TeacherError if it is a tokenizer of Hugging
    Face, as SigLIP has, and cannot be loaded."""
    try:
        return open_clip.get_tokenizer(name)
    except ImportError as error:
        what = f"{name} has a tokenizer of Hugging Face: {error}"
        raise TeacherError(what, remedy='pip install "dimefm[hf]"') from error
    except (OSError, ValueError) as error:  # the Hub is not reached or does not know it, or its files are broken
        what = f"the tokenizer of {name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise TeacherError(
            what, remedy="it is fetched from the Hub once: run this where that can be reached"
        ) from error


def fast_tokenizer(tokenizer: Any) -> Callable[[list[str]], torch.Tensor]:
    """A function from sentences to int64 (B, L) that does what `tokenizer`, one of open_clip's, does: a FastTokenizer
    if that gives the same, else the tokenizer itself. (Those of Hugging Face are not written in Python.)"""
    if (
        type(tokenizer) is not SimpleTokenizer
        or tokenizer.reduction_fn
        or tokenizer.clean_fn is not get_clean_fn("lower")
    ):
        return tokenizer  # type: ignore[no-any-return]
    return FastTokenizer(tokenizer)


def canonical(tokenizer: Any) -> Callable[[str], str] | None:
    """A function from a text to its canonical form for one of open_clip's tokenizers: texts of the same form have the
    same tokens, and a text of an empty form has none. None if it is not known what the tokenizer does.

    The form is exact for ASCII, and for texts of which nothing is left. Other texts are returned as they are, since
    ftfy takes 20 to 40 microseconds for each: so two of these may have the same tokens and different forms.
    """
    clean = getattr(tokenizer, "clean_fn", None)
    if clean is None:
        return None
    plainly: Callable[[str], str] = {
        get_clean_fn("lower"): str.lower,
        get_clean_fn("canonicalize"): canonicalize_text,
    }.get(clean, str)

    def of(text: str) -> str:
        if text.isascii() and "&" not in text:
            return plainly(text)
        if len(text) > _MOST_CLEANED or ("&" not in text and any(map(str.isalnum, text))):
            return text
        return clean(text)  # type: ignore[no-any-return]

    return of


def cuts(tokenizer: Any) -> Callable[[str], bool] | None:
    """A function that says whether a text has more tokens than one of open_clip's tokenizers keeps. None for another
    tokenizer, which cannot be asked for more."""
    if not isinstance(tokenizer, SimpleTokenizer | HFTokenizer):
        return None
    tokenize, length = fast_tokenizer(tokenizer), int(tokenizer.context_length)

    def is_cut(text: str) -> bool:
        if len(text) + 2 <= length and text.isascii():  # a token has a letter or more; two mark the ends
            return False
        (tokens_L,) = tokenize([text])
        if tokens_L[-2] == tokens_L[-1]:  # there is padding
            return False
        (more_L,) = tokenizer([text], 2 * length)
        return bool((more_L[:length] != tokens_L).any() or (more_L[length:] != more_L[-1]).any())

    return is_cut


class FastTokenizer:
    """Gives the tokens of a SimpleTokenizer that lowers the case and cuts off what is too long. Safe in threads.

    The tokens are the same for every text of up to 4,096 characters, and for plain text of any length. In a longer text
    that is not plain, only the words within the first 4,096 characters are looked at, so that it takes milliseconds.
    The tokens may then differ: ftfy cannot use what follows to mend what is before, and if those characters are nearly
    all white space or escapes, there are fewer tokens than the context has places.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._clean, self._length = tokenizer.clean_fn, int(tokenizer.context_length)
        self._start, self._end = _packed([tokenizer.sot_token_id]), _packed([tokenizer.eot_token_id])
        self._tokens_of = _Words(tokenizer, self._length - 2).__getitem__

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 (B, L): start, tokens, end, then zeros."""
        if not texts:
            return torch.zeros(0, self._length, dtype=torch.long)
        room, start, end = self._length - 2, self._start, self._end
        most, row = room * len(start), self._length * len(start)
        rows = []
        for text in texts:
            clean = text.lower() if _is_plain(text) else self._cleaned(text)
            tokens = b"".join(map(self._tokens_of, clean.split(None, room)[:room]))
            rows.append((start + tokens[:most] + end).ljust(row, b"\0"))
        return torch.frombuffer(bytearray().join(rows), dtype=torch.long).view(len(texts), self._length)

    def _cleaned(self, text: str) -> str:
        if len(text) > _MOST_CLEANED:
            text = text[:_MOST_CLEANED]
            text = text.rpartition(" ")[0] or text
        return self._clean(text)  # type: ignore[no-any-return]


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and "&" not in text


def _packed(tokens: list[int]) -> bytes:
    return np.array(tokens, np.int64).tobytes()


class _Words(dict[str, bytes]):
    """Word to its first `room` tokens, as the bytes of int64. Those of a new word are computed, and kept."""

    def __init__(self, tokenizer: Any, room: int) -> None:
        super().__init__()
        self._pattern, self._letters, self._ids = tokenizer.pat, tokenizer.byte_encoder, tokenizer.encoder
        self._ranks, self._room = tokenizer.bpe_ranks, room
        self._special = {tokenizer.decoder[token] for token in tokenizer.all_special_ids}
        self._longest = max(len(token.removesuffix(_END)) for token in self._ids)

    def __missing__(self, word: str) -> bytes:
        match = self._pattern.match(word)
        is_one_piece = match is not None and match.group() == word
        packed = _packed(self._tokens(word)) if is_one_piece else self._of_pieces(word)
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = packed
        return packed

    def _of_pieces(self, word: str) -> bytes:
        """The tokens of a word of several pieces: each piece has those that it would have as a word of its own."""
        packed, most = b"", self._room * len(_packed([0]))
        for match in self._pattern.finditer(word):
            packed += self[match.group()]
            if len(packed) >= most:
                break
        return packed[:most]

    def _tokens(self, piece: str) -> list[int]:
        """The first `room` tokens of a piece."""
        if piece in self._special:
            return [self._ids[piece]]
        most = (self._room + 4) * self._longest
        letters = [self._letters[byte] for byte in piece[: most + 1].encode()]
        tokens = self._first_tokens(letters[:most]) if len(letters) > most else None
        if tokens is None:
            letters = [self._letters[byte] for byte in piece.encode()]
            letters[-1] += _END
            tokens = join_pairs(letters, self._ranks)
        return [self._ids[token] for token in tokens[: self._room]]

    def _first_tokens(self, letters: list[str]) -> list[str] | None:
        """The first `room` tokens of a long piece that begins with `letters`, if they do not depend on what follows.

        If a token ends at some place in a piece, the tokens up to there are those of the letters up to there alone,
        since nothing was joined across that place. And two rows of tokens can be put together as they are, if joining
        does not change the last token of one and the first of the other when these two meet. A token ends within any
        `longest` neighbouring letters. So the piece begins with `first`, if `first` stays the same before every token
        that may follow it, whichever of the possible places the next letters end at.
        """
        first = join_pairs(letters, self._ranks)[: self._room]
        at = sum(map(len, first))
        ends = range(at + 3 * self._longest + 1, at + 4 * self._longest + 1)
        following = {join_pairs(letters[at:end], self._ranks)[0] for end in ends}
        last = first[-1]
        for token in following:
            if join_pairs([*last, *token], self._ranks) != [last, token]:
                return None
        return first


def join_pairs(letters: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The tokens of a row of letters by byte-pair encoding: again and again, all pairs of the least rank are joined,
    from left to right. It takes n log n steps: SimpleTokenizer looks through the whole row each time."""
    # A linked list: the token at a place is empty once it was joined to the one before it.
    tokens, count = list(letters), len(letters)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))

    def rank_at(place: int) -> int | None:
        return ranks.get((tokens[place], tokens[after[place]])) if after[place] < count else None

    found = ((ranks.get(pair), place) for place, pair in enumerate(pairwise(letters)))
    heap = [(rank, place) for rank, place in found if rank is not None]
    heapify(heap)
    while heap:
        least, joined = heap[0][0], []
        while heap and heap[0][0] == least:
            place = heappop(heap)[1]
            if rank_at(place) != least:  # one of the two has been joined to another
                continue
            taken = after[place]
            tokens[place], tokens[taken], after[place] = tokens[place] + tokens[taken], "", after[taken]
            if after[place] < count:
                before[after[place]] = place
            joined.append(place)
        for place in joined:
            for near in (before[place], place):
                if near >= 0 and (rank := rank_at(near)) is not None:
                    heappush(heap, (rank, near))
    return [token for token in tokens if token]
