"""The tokenizer of a model as one file, tokenizer.json, that Hugging Face's tokenizers reads: nobody needs open_clip to
use an exported model.

open_clip cleans a sentence in Python before its tokens are looked up: ftfy mends it, HTML is unescaped, and the clean
function of the tokenizer lowers the case or takes the punctuation out. The file does the same by rules that replace one
thing by another. What has no such form stays as it is: text that was decoded wrongly ("Ã©" for "é"), rare escapes of
HTML, and full-width forms of letters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.entities import html5
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn

from cache_schemas.export import TOKENIZER_FILE
from dimefm.errors import DimefmError

_ESCAPED = "\"'<>\t\n\r\xa0£©®°·»«¼½¾éøß€‘’“”–—•…™"  # by HTML; & itself comes first
_ACCENTS = {"acute": "\u0301", "grave": "\u0300", "circ": "\u0302", "tilde": "\u0303", "uml": "\u0308",
            "cedil": "\u0327", "ring": "\u030a", "caron": "\u030c"}  # fmt: skip
_REPLACED = [
    ("\x1b\\[[0-9;]*[a-zA-Z]", ""),  # colours of a terminal
    *[(chr(0xFB00 + at), text) for at, text in enumerate(("ff", "fi", "fl", "ffi", "ffl", "ſt", "st"))],
    ("[\u201c-\u201f]", '"'),
    ("[\u02bc\u2018-\u201b]", "'"),
    ("[\r\u2028\u2029\u0085]", " "),
    ("[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", ""),
]
"""What ftfy replaces, in its order: a pattern, and what takes its place."""

_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_TRIED = (
    "a photo of a dog.",
    "It\u2019s  \u201cTHE\u201d caf\u00e9's 25 cats & dogs, na\u00efve_one",
    "R&amp;B\n on a sunny\tday \U0001f600!!",
    " ".join(["a long sentence about nothing at all"] * 60),
    "",
)


def write_tokenizer(tokenizer: Any, folder: Path, context_length: int) -> None:
    """Write the file beside a model. It gives what `tokenizer`, one of open_clip's, gives: ids of the context length,
    cut off or padded. A file of this name is left as it is: in an open_clip folder it is that which open_clip reads.
    Raises DimefmError for a tokenizer without such a form."""
    if (folder / TOKENIZER_FILE).exists():
        return
    made = _simple(tokenizer) if isinstance(tokenizer, SimpleTokenizer) else _hugging_face(tokenizer, context_length)
    if isinstance(tokenizer, SimpleTokenizer):
        made.enable_truncation(context_length)
        made.enable_padding(length=context_length, pad_id=0, pad_token=tokenizer.decoder[0])
    found = [one.ids for one in made.encode_batch(list(_TRIED))]
    if found != tokenizer(list(_TRIED), context_length=context_length).tolist():
        raise _cannot(tokenizer, "the file would give other tokens")
    made.save(str(folder / TOKENIZER_FILE))


def _cannot(tokenizer: Any, why: str) -> DimefmError:
    what = f"the tokenizer {type(tokenizer).__name__} cannot be written as {TOKENIZER_FILE}: {why}"
    return DimefmError(what, remedy="give --format open_clip")


def _simple(tokenizer: SimpleTokenizer) -> Any:
    """CLIP's byte-pair encoding. ftfy's replacements are done by the rules of this module."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    if tokenizer.reduction_fn:
        raise _cannot(tokenizer, "it cuts long sentences at random")
    merges = [pair for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    begin, finish = tokenizer.decoder[start], tokenizer.decoder[end]
    made = Tokenizer(models.BPE(dict(tokenizer.encoder), merges, end_of_word_suffix="</w>", unk_token=finish))
    special = [tokenizer.decoder[one] for one in tokenizer.all_special_ids]
    made.add_special_tokens([AddedToken(one, normalized=True, special=True) for one in special])
    made.normalizer = _cleaning(tokenizer)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {finish}", special_tokens=[(begin, start), (finish, end)]
    )
    return made


def _hugging_face(tokenizer: Any, context_length: int) -> Any:
    """A tokenizer of Hugging Face as open_clip calls it: after its own cleaning."""
    from tokenizers import Tokenizer, normalizers

    if not isinstance(tokenizer, HFTokenizer) or not hasattr(tokenizer.tokenizer, "backend_tokenizer"):
        raise _cannot(tokenizer, "it is not one of tokenizers, the library in Rust")
    if tokenizer.tokenizer_mode:
        raise _cannot(tokenizer, f"its mode {tokenizer.tokenizer_mode} has no such form")
    tokenizer(["a"], context_length=context_length)  # sets how it cuts and pads
    state = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    if tokenizer.strip_sep_token:  # open_clip puts 0 in its place
        known = (state["post_processor"] or {}).get("special_tokens", {})
        known.get(str(tokenizer.tokenizer.sep_token), {})["ids"] = [0]
    made = Tokenizer.from_str(json.dumps(state))
    own = made.normalizer
    made.normalizer = normalizers.Sequence([_cleaning(tokenizer), *([own] if own else [])])
    return made


def _cleaning(tokenizer: Any) -> Any:
    """The rules that do what the clean function of one of open_clip's tokenizers does."""
    from tokenizers import Regex, normalizers

    def replace(pattern: str, content: str) -> Any:
        return normalizers.Replace(Regex(pattern), content)

    rules = [replace(pattern, content) for pattern, content in (*_unescaping(), *_REPLACED)]
    rules.append(normalizers.NFC())
    if tokenizer.clean_fn is get_clean_fn("canonicalize"):
        rules += [replace("_", " "), replace(r"[!-/:-@\[-`{-~]", "")]
    if tokenizer.clean_fn is not get_clean_fn("whitespace"):
        rules += [replace(r"(?<=\p{L})Σ(?!\p{L})", "ς"), normalizers.Lowercase()]  # the last sigma of a word
    return normalizers.Sequence([*rules, replace(r"\s+", " "), normalizers.Strip()])


def _unescaping() -> Iterator[tuple[str, str]]:
    """A pattern of the ways to write a character in HTML, and the character. Some names need no semicolon."""
    yield "&(?:amp;|AMP;|#38;|#x26;)+", "&"  # written twice, as in &amp;amp;
    for character in _ESCAPED:
        ways = sorted((name for name, meant in html5.items() if meant == character), reverse=True)
        for number in dict.fromkeys((ord(character), *character.encode("cp1252"))):
            ways += [f"#0*{number};", f"#[xX]0*{number:x};"]
        yield f"&(?:{'|'.join(ways)})", character
    for name, accent in _ACCENTS.items():  # &eacute; becomes e with an accent, which NFC joins
        yield f"(?<=&[a-zA-Z]){name};", accent
    yield f"&(?=[a-zA-Z][{''.join(_ACCENTS.values())}])", ""
