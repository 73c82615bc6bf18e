"""A CoCa has the two towers of a CLIP beside its decoder: it is a teacher, and each tower a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from cache_schemas.run import CONFIG_FILE, WEIGHTS_FILE
from dimefm.models.clip import load_clip
from dimefm.models.open_clip_folder import beside_text_tower, publish_folder
from dimefm.models.towers import build_student, build_text_student, student_spec, text_spec

CONFIG: dict[str, Any] = json.loads(
    (Path(open_clip.__file__).parent / "model_configs" / "coca_ViT-B-32.json").read_text()
)
SIDE, TOKENS = 32, 31
CONFIG["embed_dim"] = 48
CONFIG["vision_cfg"] |= {"image_size": SIDE, "layers": 1, "width": 64, "patch_size": 16, "head_width": 16}
CONFIG["text_cfg"] |= {"context_length": TOKENS, "width": 64, "heads": 4, "layers": 2}
CONFIG["multimodal_cfg"] |= {"context_length": TOKENS, "width": 64, "heads": 4, "layers": 1}
TEXTS = ["a dog", "a photo of a small red house by the sea", "two cats"]
Folder = tuple[str, Any]


@pytest.fixture(scope="module")
def coca(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """open_clip's CoCa in small, with random weights, as a folder; and the model."""
    folder = tmp_path_factory.mktemp("coca")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = open_clip.CoCa(**{name: value for name, value in CONFIG.items() if name != "custom_text"})
    weights = {name: value * 3 if value.ndim > 1 else value for name, value in made.state_dict().items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS_FILE)
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / CONFIG_FILE).write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocessing}))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return f"local-dir:{folder}", model.eval()


def test_a_coca_teacher_gives_what_open_clip_gives(coca: Folder) -> None:
    clip = load_clip(coca[0], device="cpu")
    pixels_B3HW = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        images_BD = coca[1].encode_image((pixels_B3HW / 255 - 0.5) / 0.5)
        texts_BD = coca[1].encode_text(clip.tokenizer(TEXTS))
    torch.testing.assert_close(clip.encode_images(pixels_B3HW), F.normalize(images_BD, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.encode_texts(TEXTS), F.normalize(texts_BD, dim=-1), atol=1e-5, rtol=0)
    alone = torch.cat([clip.encode_texts([text]) for text in TEXTS])
    torch.testing.assert_close(clip.encode_texts(TEXTS), alone, atol=1e-5, rtol=0)
    assert (texts_BD[0] @ texts_BD[1]).item() < 0.9  # they differ, so that equal ones would be seen
    assert clip.identity.context_length == TOKENS
    decoder = sum(value.numel() for value in coca[1].text_decoder.parameters())
    assert clip.weight_bytes() == 4 * (sum(value.numel() for value in coca[1].parameters()) - decoder)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_computes_in_half_precision(coca: Folder, precision: Any) -> None:
    clip, exact = (load_clip(coca[0], precision=kind, device="cpu") for kind in (precision, "fp32"))
    pixels_B3HW = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    assert (clip.encode_images(pixels_B3HW) * exact.encode_images(pixels_B3HW)).sum(-1).min() > 0.99
    assert (clip.encode_texts(TEXTS) * exact.encode_texts(TEXTS)).sum(-1).min() > 0.99


def test_a_student_is_exported_beside_its_text_tower(coca: Folder, tmp_path: Path) -> None:
    clip = load_clip(coca[0], device="cpu")
    spec = student_spec("test_resnet", clip.identity, SIDE)
    tower = {f"visual.{name}": value for name, value in build_student(spec).state_dict().items()}
    config, text = beside_text_tower(clip, spec)
    publish_folder(tmp_path / "student", config, {**text, **tower}, clip.tokenizer)
    student = load_clip(f"local-dir:{tmp_path / 'student'}", device="cpu")
    torch.testing.assert_close(student.encode_texts(TEXTS), clip.encode_texts(TEXTS), atol=1e-6, rtol=0)
    assert student.encode_images(torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)).shape == (2, 48)


def test_both_towers_are_students(coca: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "coca", CONFIG)
    teacher = load_clip(coca[0], device="cpu").identity
    assert build_student(student_spec("coca", teacher))(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 48)
    text = build_text_student(text_spec("coca", teacher))
    assert text(torch.ones(2, TOKENS, dtype=torch.long)).shape == (2, 48)
