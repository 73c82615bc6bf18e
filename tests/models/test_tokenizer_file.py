"""tokenizer.json: the ids that open_clip's tokenizer gives, for each kind of tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from dimefm.errors import DimefmError
from dimefm.models.file_tokenizer import FileTokenizer
from dimefm.models.tokenizer_file import write_tokenizer

SENTENCES = [
    "A photo of a Dog.",
    "it\u2019s \u201cthe\u201d caf\u00e9's 25 cats, isn't it? I'LL 3.14",
    "R&amp;B &amp;amp; &lt;b&gt; caf&eacute; &#8217; &#147;x&#148; &copy; AT&T &nbsp;&bull;&#13;&#10;",
    "\ufb01ne \ufb02ow a\x00b c\x1fd e\x0bf\u2028g \ufeff\x1b[31mred\x1b[0m",
    "\u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469",
    "\u039f\u0394\u039f\u03a3 \u0130stanbul e\u0301 \u00bd \u00b2",
    "a_b__c #hash @me ... !!! 'quoted' x",
    "one word " * 40,
    "x" * 300,
    " \t\n",
]


def same(tokenizer: Any, folder: Path, length: int) -> bool:
    write_tokenizer(tokenizer, folder, length)
    found = FileTokenizer(str(folder), length)(SENTENCES)
    return found.tolist() == tokenizer(SENTENCES, context_length=length).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("clean", "length"), [("lower", 77), ("whitespace", 32), ("canonicalize", 16)])
def test_clips_tokenizer_has_the_same_ids(clean: str, length: int, tmp_path: Path) -> None:
    assert same(SimpleTokenizer(clean=clean, context_length=length), tmp_path, length)


def test_what_no_rule_can_mend_is_left_as_it_is(tmp_path: Path) -> None:
    """The known differences: text that was decoded wrongly, rare escapes of HTML, full-width letters."""
    tokenizer = SimpleTokenizer(context_length=32)
    write_tokenizer(tokenizer, tmp_path, 32)
    special = ["<start_of_text> and <END_OF_TEXT> after"]
    assert FileTokenizer(str(tmp_path), 32)(special).tolist() == tokenizer(special, context_length=32).tolist()
    known = ["pok\u00c3\u00a9mon", "&#214;tzi", "\uff26\uff35\uff2c\uff2c"]
    found, wanted = FileTokenizer(str(tmp_path), 32)(known), tokenizer(known, context_length=32).numpy()
    assert (found != wanted).any(axis=1).all()


def hugging_face(folder: Path, **options: Any) -> HFTokenizer:
    """A tokenizer of Hugging Face as open_clip opens it: whole words of the test's sentences, case and all."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "[CLS]", "eos_token": "[SEP]", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HFTokenizer(str(folder), context_length=12, **options)


@pytest.mark.parametrize("options", [{}, {"clean": "canonicalize"}, {"clean": "lower", "strip_sep_token": True}])
def test_a_tokenizer_of_hugging_face_has_the_same_ids(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    tokenizer = hugging_face(tmp_path / "own", **options)
    assert same(tokenizer, tmp_path, 12)
    assert len({tuple(row) for row in tokenizer(SENTENCES).tolist()}) > 5


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(DimefmError, match=r"the tokenizer SimpleTokenizer cannot be written .* it cuts long sentences"):
        write_tokenizer(SimpleTokenizer(context_length=16, reduction_mask="simple"), tmp_path, 16)
    (tmp_path / "own").mkdir()
    with pytest.raises(DimefmError, match="its mode clips has no such form"):
        write_tokenizer(hugging_face(tmp_path / "own", tokenizer_mode="clips"), tmp_path, 12)
    with pytest.raises(DimefmError, match="the tokenizer str cannot be written"):
        write_tokenizer("", tmp_path, 12)
    assert not (tmp_path / "tokenizer.json").exists()
