"""The transformers format: the real library gives the logits, tokens and probabilities of the model it was made of."""

import copy
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from dimefm.errors import DimefmError, TeacherError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.export.config import ExportConfig
from dimefm.export.transformers_format import write
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.models.clip import Clip, load_clip
from dimefm.models.exported import format_of
from dimefm.models.open_clip_folder import beside_text_tower, publish_folder
from dimefm.models.trained import Trained
from tests.making import make_jpeg
from tests.tiny_clip import CONFIG, SIDE

TEXTS = ["a photo of a dog", "two BOATS, it\u2019s 3 &amp; a cat!", "long words " * 60, "", "x"]
SQUASH = {"size": [SIDE, SIDE], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "resize_mode": "squash"}
PLAIN = {**SQUASH, "interpolation": "bicubic", "resize_mode": "shortest"}
OTHER_PARTS = {  # all that differs from CONFIG, and still fits
    "quick_gelu": True,
    "custom_text": True,
    "vision_cfg": {"layers": 2, "width": 48, "patch_size": 8, "mlp_ratio": 2.5, "final_ln_after_pool": True},
    "text_cfg": {"context_length": 12, "pool_type": "eos", "eos_id": 49407, "mlp_ratio": 3.0, "layers": 2},
}


class Exported:
    """A model with random weights, and the folder that it was written to."""

    def __init__(self, folder: Path, changes: dict[str, Any], preprocessing: dict[str, Any]) -> None:
        config = copy.deepcopy(CONFIG)
        for part, value in changes.items():
            config[part] = {**config[part], **value} if isinstance(value, dict) else value
        kind: Any = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind(**{key: value for key, value in config.items() if key != "custom_text"})
            weights = {name: value + 0.2 * torch.randn_like(value) for name, value in model.state_dict().items()}
        publish_folder(folder / "model", {"model_cfg": config, "preprocess_cfg": preprocessing}, weights, None)
        self.clip = load_clip(f"local-dir:{folder / 'model'}", device="cpu")
        self.folder = self.write(folder / "exported")

    def write(self, folder: Path, **options: Any) -> Path:
        folder.mkdir()
        config = ExportConfig(source="x", out=str(folder), format="transformers", **options)
        write(self.clip, Path(), folder, config)
        return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("plain"), {}, PLAIN)


@pytest.fixture(scope="module", params=["plain", "other"])
def exported(request: pytest.FixtureRequest, plain: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    if request.param == "plain":
        return plain
    return Exported(tmp_path_factory.mktemp("other"), OTHER_PARTS, {**SQUASH, "interpolation": "bilinear"})


def some_pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_library_gives_the_same_logits(exported: Exported) -> None:
    from transformers import AutoModel, AutoTokenizer, CLIPModel

    clip, facts = exported.clip, exported.clip.identity.preprocessing
    model: Any = AutoModel.from_pretrained(str(exported.folder))
    tokens: Any = AutoTokenizer.from_pretrained(str(exported.folder))(
        TEXTS, padding=True, truncation=True, return_tensors="pt"
    )
    assert type(model) is CLIPModel
    pixels = normalise(some_pixels(), facts.mean, facts.std)
    with torch.inference_mode():
        found = model(pixel_values=pixels, **tokens).logits_per_image
    wanted = clip.encode_images(some_pixels()) @ clip.encode_texts(TEXTS).T * clip.identity.logit_scale
    assert wanted.std() > 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_its_pipeline_gives_the_same_probabilities(exported: Exported) -> None:
    from transformers import AutoProcessor, pipeline

    clip, labels = exported.clip, ["a cat", "THE dog", "boats"]
    image = make_jpeg((SIDE, SIDE))
    run: Any = pipeline("zero-shot-image-classification", model=str(exported.folder))
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    found = {one["label"]: one["score"] for one in run(picture, candidate_labels=labels, hypothesis_template="{}")}
    pixels = Preprocess(clip.identity.preprocessing, exact=True)(image)
    logits = clip.encode_images(pixels[None]) @ clip.encode_texts(labels).T * clip.identity.logit_scale
    for label, wanted in zip(labels, logits.softmax(dim=-1)[0].tolist(), strict=True):
        assert found[label] == pytest.approx(wanted, abs=1e-5)
    processor: Any = AutoProcessor.from_pretrained(str(exported.folder))
    prepared = processor(images=Image.effect_noise((70, 50), 60).convert("RGB"), return_tensors="pt").pixel_values
    assert prepared.shape == (1, 3, SIDE, SIDE)


def test_what_is_shipped_is_what_is_measured(exported: Exported) -> None:
    """The folder as a model of dimefm is the real CLIPModel with its tokenizer, whoever wrote it."""
    assert format_of(str(exported.folder)) == "transformers"
    clip, found = exported.clip, load_clip(f"local-dir:{exported.folder}", device="cpu")
    for ours, theirs in (
        (clip.encode_images(some_pixels()), found.encode_images(some_pixels())),
        (clip.encode_texts(TEXTS), found.encode_texts(TEXTS)),
    ):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    mine, same = clip.identity, found.identity
    assert (same.preprocessing, same.activation, same.embed_dim) == (
        mine.preprocessing,
        mine.activation,
        mine.embed_dim,
    )
    assert (same.context_length, same.logit_scale) == (mine.context_length, pytest.approx(mine.logit_scale))
    assert found.parameter_counts() == clip.parameter_counts()
    assert found.text_digest() != clip.text_digest()
    with pytest.raises(TeacherError, match="has its preprocessing: --mean would have no effect"):
        load_clip(f"local-dir:{exported.folder}", trained=Trained(mean=(0.5, 0.5, 0.5)), device="cpu")
    spec: Any = None
    with pytest.raises(TeacherError, match="is not in the format of open_clip, in which students are written"):
        beside_text_tower(found, spec)


@pytest.mark.slow
def test_a_folder_is_evaluated_as_the_model_that_it_was_made_of(plain: Exported, cifar10: str, tmp_path: Path) -> None:
    found = []
    for model in (plain.folder, plain.folder.parent / "model"):
        config = EvaluationConfig(model=str(model), folders=(cifar10,), out=str(tmp_path), name=model.name)
        found += evaluate(config).results
    theirs, ours = found
    assert theirs.images == ours.images == 200
    assert theirs.metrics["top1"] == pytest.approx(ours.metrics["top1"], abs=0.011)  # two near ties
    assert theirs.model["weights"] == load_clip(f"local-dir:{plain.folder}", device="cpu").identity.weights


def test_a_preprocessing_beside_its_own_is_refused(plain: Exported) -> None:
    with pytest.raises(TeacherError, match="is a transformers model, which has its preprocessing: --mean"):
        load_clip(f"local-dir:{plain.folder}", trained=Trained(mean=(0.1, 0.1, 0.1)), device="cpu")


@pytest.mark.slow
def test_a_folder_that_the_library_wrote_is_a_model_too(plain: Exported, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    for part in (AutoModel, AutoProcessor):
        made: Any = part.from_pretrained(str(plain.folder))
        made.save_pretrained(str(tmp_path))
    theirs, ours = (load_clip(f"local-dir:{folder}", device="cpu") for folder in (tmp_path, plain.folder))
    assert torch.equal(theirs.encode_texts(TEXTS), ours.encode_texts(TEXTS))
    assert theirs.identity.weights == ours.identity.weights
    assert theirs.identity.preprocessing == ours.identity.preprocessing


def test_float16_halves_the_weights(plain: Exported, tmp_path: Path) -> None:
    halved = plain.write(tmp_path / "halved", precision="fp16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (plain.folder, halved)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
    found = load_clip(f"local-dir:{halved}", device="cpu", precision="fp16")
    similar = (found.encode_texts(TEXTS) * plain.clip.encode_texts(TEXTS)).sum(dim=-1)
    assert similar.min() > 0.999
    assert json.loads((halved / "config.json").read_text())["dtype"] == "float16"


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        *parts, last = path.split(".")
        for part in parts:
            model = getattr(model, part)
        setattr(model, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("visual", nn.Linear(2, 2)), "its image tower is a Linear, not open_clip's own ViT"),
        (_set("text", nn.Linear(2, 2)), "its text tower is a Linear, not open_clip's own text"),
        (_set("visual.pool_type", "avg"), "pools otherwise than by the class token"),
        (_set("visual.ln_pre", nn.Identity()), "has no norm before the first layer"),
        (_set("attn_mask", None), "has no causal mask"),
        (_set("text_projection", None), "is not projected by a matrix alone"),
        (_set("text_pool_type", "last"), r"pools otherwise than at the end token \(last\)"),
        (_set("visual.transformer.resblocks.0.mlp.gelu", nn.ReLU()), r"image tower has the activation ReLU\(\)"),
        (_set("visual.ln_post", nn.LayerNorm(32, eps=1e-3)), "image tower has norms with different eps"),
        (_set("visual.transformer.resblocks.0.ls_1", nn.PReLU(32)), "no CLIPModel has, such as .*ls_1.weight"),
        (_set("visual.image_size", (SIDE, 48)), "its images or its patches are not square"),
    ],
)
def test_another_tower_is_refused(change: Callable[[Any], None], message: str, plain: Exported, tmp_path: Path) -> None:
    model = copy.deepcopy(plain.clip.model)
    change(model)
    require_refused(Clip(model, plain.clip.tokenizer, plain.clip.identity, {}, "cpu"), tmp_path, message)


def test_what_its_files_cannot_say_is_refused(plain: Exported, tmp_path: Path) -> None:
    facts = plain.clip.identity
    padded = replace(facts, preprocessing=replace(facts.preprocessing, resize_mode="longest"))
    for identity, message in (
        (padded, "resize_mode longest"),
        (replace(facts, logit_bias=-10.0), "logits have a bias"),
    ):
        require_refused(Clip(plain.clip.model, plain.clip.tokenizer, identity, {}, "cpu"), tmp_path, message)
    other: Any = lambda texts: plain.clip.tokenizer(texts)  # noqa: E731
    require_refused(
        Clip(plain.clip.model, other, facts, {}, "cpu"), tmp_path, "its tokenizer is a function, not CLIP's"
    )


def require_refused(clip: Clip, folder: Path, message: str) -> None:
    config = ExportConfig(source="x", out=str(folder / "x"), format="transformers")
    with pytest.raises(DimefmError, match=f"cannot hold this model: .*{message}") as error:
        write(clip, Path(), folder, config)
    assert "--format open_clip or onnx" in str(error.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, "prepares images in a way that dimefm does not"),
        ("preprocessor_config.json", {"resample": 0}, "prepares images in a way"),
        (
            "preprocessor_config.json",
            {"size": 40, "crop_size": 40},
            r"images of \(40, 40\) px, and its image tower takes",
        ),
        ("config.json", {"projection_dim": 17}, "cannot be loaded as a CLIPModel"),
        (
            "config.json",
            {"text_config": {"num_hidden_layers": 2}},
            r"other weights than its config.json says, first text",
        ),
        ("config.json", {"text_config": {"hidden_act": "relu"}}, "have the activation gelu and relu"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", "x.Y"]}}, ""),
    ],
)
def test_a_folder_of_any_origin_is_read_strictly(
    file: str, change: dict[str, Any], message: str, plain: Exported, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(plain.folder, folder)
    (folder / "x.py").write_text("raise SystemExit('code of the folder was run')")
    content = json.loads((folder / file).read_text())
    for name, value in change.items():
        content[name] = {**content[name], **value} if name == "text_config" else value
    (folder / file).write_text(json.dumps(content))
    if message:
        with pytest.raises(TeacherError, match=message):
            load_clip(f"local-dir:{folder}", device="cpu")
    else:
        assert np.allclose(load_clip(f"local-dir:{folder}", device="cpu").encode_texts(["a"]).norm(dim=1), 1)
