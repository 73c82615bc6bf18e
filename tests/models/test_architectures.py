"""open_clip's architectures as teachers and students, as docs/architectures.md has them."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch.nn.functional import normalize

from benchmarks.architectures import Examined, examine, written
from dimefm.errors import TeacherError, TrainingError
from dimefm.models.clip import Clip, wrap
from dimefm.models.first_weights import load_first_weights
from dimefm.models.tokenizer import open_tokenizer
from dimefm.models.towers import build_student, build_text_student, student_spec, text_spec
from tests.stores import teacher_identity

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TEXTS = ["a photo of a cat", "two dogs run over a green field near a river, and a third does not", "x"]

# In small what SigLIP is: towers without projections of their own, no causal mask, the last token, squashed images.
SIGLIP: dict[str, Any] = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 16, "vocab_size": 2000, "width": 64, "heads": 2, "layers": 2, "no_causal_mask": True,
        "proj_type": "none", "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "hf_tokenizer_name": "some/where",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    },
}  # fmt: skip


class Words:
    """A tokenizer as SigLIP's: its padding is the mark at the end, and the text tower looks at it."""

    context_length = 16

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens_BL = torch.ones(len(texts), self.context_length, dtype=torch.long)
        for row, text in enumerate(texts):
            words = [2 + sum(word.encode()) for word in text.split()][: self.context_length - 1]
            tokens_BL[row, : len(words)] = torch.tensor(words)
        return tokens_BL


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """open_clip says that weights are random."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def siglip(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-siglip", SIGLIP)
    monkeypatch.setattr("open_clip.get_tokenizer", lambda name: Words())
    return "tiny-siglip"


# -- a teacher like SigLIP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_siglip_gives_what_open_clip_gives(siglip: str, precision: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = open_clip.create_model(siglip).eval()
        for parameter in model.text.parameters():
            torch.nn.init.normal_(parameter, std=0.6)  # so that sentences differ
        pixels_B3HW = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    clip = wrap(copy.deepcopy(model), siglip, None, SIGLIP, precision=precision, device="cpu")
    with torch.no_grad():
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (clip.identity.preprocessing.mean, clip.identity.preprocessing.std)
        )
        images_BD = normalize(model.encode_image((pixels_B3HW / 255 - mean) / std), dim=-1)
        texts_BD = normalize(model.encode_text(Words()(TEXTS)), dim=-1)
    least = 1 - (1e-5 if precision == "fp32" else 3e-2)
    assert (clip.encode_images(pixels_B3HW) * images_BD).sum(dim=-1).min() > least
    assert (clip.encode_texts(TEXTS) * texts_BD).sum(dim=-1).min() > least
    assert (texts_BD @ texts_BD.T).min() < 0.9
    alone_BD = torch.cat([clip.encode_texts([text]) for text in TEXTS])  # whose padding is not cut off
    assert (alone_BD * clip.encode_texts(TEXTS)).sum(dim=-1).min() > least
    assert (clip.identity.logit_bias, clip.identity.context_length) == (-10, 16)


@pytest.mark.parametrize("width", [64, 96])
def test_towers_without_a_projection_are_students_of_any_width(
    siglip: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They gave their own width, at which training stopped."""
    pooled = {**SIGLIP["vision_cfg"], "timm_pool": "avg"}  # a trunk of SigLIP pools by attention before it is asked to
    monkeypatch.setitem(SIGLIP, "vision_cfg", pooled)
    teacher = teacher_identity(embed_dim=width)
    spec, text = student_spec(siglip, teacher), text_spec(siglip, teacher)
    assert build_student(spec)(torch.zeros(2, 3, 160, 160)).shape == (2, width)
    assert build_text_student(text)(Words()(TEXTS)).shape == (3, width)
    assert spec.vision_cfg["timm_proj"] == ("none" if width == 64 else "linear")
    assert open_clip.get_model_config(siglip)["vision_cfg"]["timm_proj"] == "none"


def test_a_tower_that_gives_another_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**SIGLIP, "embed_dim": 96}  # which it does not have
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-wrong", config)
    with pytest.raises(
        TrainingError, match="cannot build tiny-wrong at 160 px: it does not give one embedding of width 96"
    ):
        build_student(student_spec("tiny-wrong", teacher_identity(embed_dim=96)))


@pytest.mark.parametrize("tower", ["test_vit", "test_convnext"])
def test_a_projection_within_a_tower_of_timm_may_be_of_another_width(
    monkeypatch: pytest.MonkeyPatch, tower: str
) -> None:
    """As MobileCLIP, EVA and PE have it: the classifier of the trunk. Their weights were refused as --init."""
    vision = {"image_size": 160, "timm_model_name": tower, "timm_pool": "avg", "timm_proj": None}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-timm", {**SIGLIP, "vision_cfg": vision})
    theirs = build_student(student_spec("tiny-timm", teacher_identity(embed_dim=64)))
    spec = student_spec("tiny-timm", teacher_identity(embed_dim=96))
    mine = build_student(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimefm.models.first_weights._read", lambda *_: theirs.state_dict())
        random = load_first_weights(mine, spec, "somewhere")
    assert random
    assert all(re.fullmatch(r"trunk\.head\.(fc\.)?(weight|bias)", name) for name in random)
    assert all(
        torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items() if name not in random
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'transformers'"),
            r'tokenizer of Hugging Face[^@]*pip install "dimefm\[hf\]"',
        ),
        (
            OSError("We couldn't connect\nto anything"),
            r"any cannot be loaded: We couldn't connect\n[^@]*Hub",
        ),
    ],
)
def test_a_tokenizer_that_is_not_here_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr("open_clip.get_tokenizer", fails)
    with pytest.raises(TeacherError, match=said):
        open_tokenizer("any")


# -- the page -------------------------------------------------------------------------------------------------------


def test_the_page_has_every_architecture() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = re.findall(r"^\| ([\w.-]+) \|", text, re.MULTILINE)[2:]
    assert len(names) == len(set(names)) > 100
    if f"What open_clip {open_clip.__version__} " in text:
        # Its own files: other tests make more architectures known to it.
        assert set(names) == {file.stem for file in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")}


def test_some_are_as_the_page_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in ("ViT-S-32-alt", "ViT-B-16-SigLIP", "roberta-ViT-B-32"):
        found = examine(name)
        assert "| " + " | ".join(found.cells()) + " |" in page
        assert found.student == "yes"


@pytest.mark.slow
def test_all_are_as_the_page_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [examine(name) for name in open_clip.list_models()]
    if f"What open_clip {open_clip.__version__} (with timm {timm.__version__})" in page:
        assert written(rows) == page
    refused = [row for row in rows if "no:" in row.teacher + row.student + row.text_student]
    assert refused == list[Examined]()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-S-32-alt", "RN50", "convnext_tiny", "MobileCLIP-S1", "PE-Core-T-16-384", "ViTamin-S", "EVA02-B-16"]
)
def test_one_of_each_kind_gives_what_open_clip_gives(name: str) -> None:
    """With random weights, through what a teacher goes through."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(name).eval()
    clip: Clip = wrap(
        copy.deepcopy(model), name, None, open_clip.get_model_config(name), precision="fp32", device="cpu"
    )
    facts = clip.identity.preprocessing
    pixels_B3HW = torch.randint(0, 256, (2, 3, *facts.size), dtype=torch.uint8)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (facts.mean, facts.std))
    with torch.no_grad():
        images_BD = normalize(model.encode_image((pixels_B3HW / 255 - mean) / std), dim=-1)
        texts_BD = normalize(model.encode_text(open_clip.get_tokenizer(name)(TEXTS)), dim=-1)
    torch.testing.assert_close(clip.encode_images(pixels_B3HW), images_BD, atol=1e-4, rtol=0)
    torch.testing.assert_close(clip.encode_texts(TEXTS), texts_BD, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "remedy"),
    [
        ("ViT-S-32", 1, "an --image-size that is a multiple of its patch of 32 px, such as 224, or another --student"),
        ("test_convnext", 1, "an --image-size nearer to its own, which is 160, or another --student"),
    ],
)
def test_a_size_that_a_tower_cannot_take_is_refused_with_those_that_fit(name: str, size: int, remedy: str) -> None:
    with pytest.raises(TrainingError) as caught:
        build_student(student_spec(name, teacher_identity(), size))
    assert caught.value.what.startswith(f"cannot build {name} at {size} px: ")
    assert remedy in (caught.value.remedy or "")


def test_an_error_of_any_kind_while_a_tower_is_built_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def divide(*arguments: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("dimefm.models.towers._build_vision_tower", divide)
    with pytest.raises(TrainingError, match="cannot build resnet18 at 1 px: float division by zero"):
        build_student(student_spec("resnet18", teacher_identity(), 1))
