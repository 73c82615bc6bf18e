"""The tokenizer of a model as one file, tokenizer.json, that Hugging Face's tokenizers reads: nobody needs open_clip to
use an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from cache_schemas.export import TOKENIZER_FILE
from dimefm.errors import DimefmError


def write_tokenizer(tokenizer: Any, folder: Path, context_length: int) -> None:
    """Write the file beside a model. It gives what `tokenizer`, one of open_clip's, gives: ids of the context length,
    cut off or padded. Raises DimefmError for a tokenizer without such a form."""
    if not isinstance(tokenizer, SimpleTokenizer):
        what = f"the tokenizer {type(tokenizer).__name__} cannot be written as {TOKENIZER_FILE}"
        raise DimefmError(what, remedy="give --format open_clip")
    _clip_tokenizer(tokenizer, context_length).save(str(folder / TOKENIZER_FILE))


def _clip_tokenizer(tokenizer: SimpleTokenizer, context_length: int) -> Any:
    """CLIP's byte-pair encoding. ftfy and the unescaping of HTML have no counterpart: text that needs to be mended has
    other tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    merges = [pair for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    begin, finish = tokenizer.decoder[start], tokenizer.decoder[end]
    made = Tokenizer(models.BPE(dict(tokenizer.encoder), merges, end_of_word_suffix="</w>", unk_token=finish))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {finish}", special_tokens=[(begin, start), (finish, end)]
    )
    made.enable_truncation(context_length)
    made.enable_padding(length=context_length, pad_id=0, pad_token=tokenizer.decoder[0])
    return made
