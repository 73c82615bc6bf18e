"""Checkpoints of the authors become open_clip folders with the outputs of their own modules, written here again."""

from __future__ import annotations

import argparse
import errno
import json
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from dimefm.cli import cli
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, SourceError, StoreError
from dimefm.models.authors_checkpoint import convert, image_tower

WIDTH, LAYERS, SIZE, EMBED = 128, 2, 32, 64  # of the small tower, whose patches are of 16 px
State = dict[str, torch.Tensor]


class Norm(nn.Module):
    """With the epsilon inside the root, in both forms."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + self.epsilon) + self.bias


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1, self.ln_2 = Norm(width, epsilon), Norm(width, epsilon)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Tower(nn.Module):
    """The authors' image tower, images (B, 3, H, W) to (B, D); its projection is `proj` whatever the form calls it."""

    def __init__(
        self, epsilon: float, width: int = 128, layers: int = LAYERS, patch: int = 16, size: int = SIZE, embed: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = Norm(width, epsilon), Norm(width, epsilon)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[Block(width, epsilon) for _ in range(layers)])
        self.proj = nn.Parameter(torch.randn(width, embed))
        for name, parameter in self.named_parameters():
            centre = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            nn.init.normal_(parameter, centre, 0.2 if parameter.ndim == 1 else 0.05)
        # What ln_pre is given has a variance of the size of OpenAI's epsilon.
        nn.init.normal_(self.conv1.weight, 0, 1e-4)
        nn.init.normal_(self.positional_embedding, 0, 3e-3)
        nn.init.normal_(self.class_embedding, 0, 3e-3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj  # type: ignore[no-any-return]


def named(state: State, tower: str, projection: str, prefix: str = "") -> State:
    """A tower's state as a form names it."""
    return {prefix + (projection if name == "proj" else f"{tower}.{name}"): value for name, value in state.items()}


def training(tower: Tower, state: State, prefix: str = "") -> dict[str, Any]:
    """What the training code saves after an epoch."""
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3)
    schedule = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-5, warmup_t=2, t_in_epochs=False)
    tower(torch.zeros(1, 3, SIZE, SIZE)).sum().backward()
    kept = {name: value.clone() for name, value in state.items()}  # before the step, which is in place
    optimizer.step()
    return {
        "epoch": 3,
        "image_state_dict": OrderedDict(named(kept, "visual", "visual.proj", prefix)),
        "best_loss": 1e7,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "img_optimizer_state_dict": optimizer.state_dict(),
        "img_scheduler_state_dict": schedule.state_dict(),
    }


def text_side(teacher: Path) -> State:
    """The text tower within a checkpoint: the teacher's, with a logit scale of the student's."""
    state = load_file(teacher / "open_clip_model.safetensors")
    return {name: value for name, value in state.items() if not name.startswith("visual.")} | {
        "logit_scale": torch.ones([])
    }


FORMS = {
    "training": (1e-5, lambda tower, state, text: training(tower, state)),
    "training with module": (1e-5, lambda tower, state, text: training(tower, state, "module.")),
    "released, bare": (1e-12, lambda tower, state, text: named(state, "image_encoder", "image_projection")),
    "released, with module": (
        1e-12,
        lambda tower, state, text: {"model": named(state, "image_encoder", "image_projection", "module.")},
    ),
    "released, with text and head": (
        1e-12,
        lambda tower, state, text: {
            "model": {
                **text,
                **named(state, "visual", "vision_projection"),
                "visual.head.weight": torch.ones(10, WIDTH),
                "visual.head.bias": torch.ones(10),
            }
        },
    ),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / "quick")


def make_teacher(folder: Path, embed: int = EMBED, quick_gelu: bool = True, custom_text: bool = False) -> Path:
    """A folder of open_clip with random weights, from which only the text tower is of interest."""
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    cfg = {"embed_dim": embed, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**cfg)
    folder.mkdir(parents=True)
    preprocessing = {"size": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    whole = {**cfg, "custom_text": True} if custom_text else cfg
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": whole, "preprocess_cfg": preprocessing}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def make_tower(epsilon: float, **sizes: int) -> Tower:
    torch.manual_seed(0)
    return Tower(epsilon, **sizes).eval()


def released(tower: Tower | None = None) -> dict[str, Any]:
    """A checkpoint of the released form, as a dict to spoil."""
    return {"model": named((tower or make_tower(1e-12)).state_dict(), "image_encoder", "image_projection")}


def loaded(folder: Path) -> Any:
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")


def save(content: object, folder: Path) -> str:
    torch.save(content, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth")


def refused(content: object, teacher: Path, folder: Path, kind: type[DimefmError] = SourceError) -> str:
    """The message for a checkpoint with this content; nothing was written."""
    checkpoint = str(content) if isinstance(content, Path) else save(content, folder)
    with pytest.raises(kind) as caught:
        convert(checkpoint, str(folder / "out"), teacher=f"local-dir:{teacher}")
    assert [path for path in folder.iterdir() if "out" in path.name] == []
    assert caught.value.remedy
    assert caught.value.what.startswith(checkpoint)
    return caught.value.what.removeprefix(checkpoint)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_open_clip_has_the_outputs_of_the_authors_module(form: str, half: bool, teacher: Path, tmp_path: Path) -> None:
    epsilon, make = FORMS[form]
    tower = make_tower(epsilon)
    if half:
        tower.half().float()  # values that float16 holds
    pixels = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = tower(pixels)
    state = {name: value.half() if half else value for name, value in tower.state_dict().items()}
    convert(
        save(make(tower, state, text_side(teacher)), tmp_path), str(tmp_path / "out"), teacher=f"local-dir:{teacher}"
    )
    model, _, preprocess = loaded(tmp_path / "out")
    with torch.inference_mode():
        mine = model.eval().encode_image(pixels)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert theirs.std(dim=0).min() > 1e-3 * float(theirs.abs().max()), "the features depend on the pixels"
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float32}
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert config["preprocess_cfg"]["std"] == [0.26862954, 0.26130258, 0.27577711]
    assert preprocess.transforms[0].size == SIZE


@pytest.mark.parametrize("custom_text", [False, True])
def test_the_text_tower_is_the_teachers(custom_text: bool, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", custom_text=custom_text)
    convert(save(released(), tmp_path), str(tmp_path / "out"), teacher=f"local-dir:{teacher}")
    mine, theirs = loaded(tmp_path / "out")[0], loaded(teacher)[0]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a photo of a cat", "two dogs"])
    assert tokens.shape == (2, 16)
    with torch.inference_mode():
        assert torch.equal(mine.eval().encode_text(tokens), theirs.eval().encode_text(tokens))
    assert torch.equal(mine.logit_scale, theirs.logit_scale)


def test_every_layer_norm_of_the_image_tower_has_the_epsilon(teacher: Path, tmp_path: Path) -> None:
    convert(save(released(), tmp_path), str(tmp_path / "out"), teacher=f"local-dir:{teacher}")
    model = loaded(tmp_path / "out")[0]
    norms = [module.eps for module in model.visual.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-12] * (2 * LAYERS + 2)
    assert {module.eps for module in model.transformer.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_the_published_tower_is_open_clips_vit_b_32(epsilon: float) -> None:
    with torch.device("meta"):
        state = Tower(epsilon, width=768, layers=12, patch=32, size=224, embed=768).state_dict()
    names = ("visual", "visual.proj") if epsilon == 1e-5 else ("visual", "vision_projection")
    spec, image = image_tower("checkpoint.pth", named(state, *names))
    expected = {**open_clip.get_model_config("ViT-B-32-quickgelu")["vision_cfg"]}
    assert spec.vision_cfg == expected | ({} if epsilon == 1e-5 else {"norm_kwargs": {"eps": epsilon}})
    assert (spec.embed_dim, spec.image_size, spec.activation) == (768, 224, "quick_gelu")
    shapes = {name: tuple(value.shape) for name, value in image.items()}
    block = {
        "attn.in_proj_weight": (2304, 768), "attn.in_proj_bias": (2304,),
        "attn.out_proj.weight": (768, 768), "attn.out_proj.bias": (768,),
        "mlp.c_fc.weight": (3072, 768), "mlp.c_fc.bias": (3072,),
        "mlp.c_proj.weight": (768, 3072), "mlp.c_proj.bias": (768,),
        **{f"ln_{i}.{part}": (768,) for i in (1, 2) for part in ("weight", "bias")},
    }  # fmt: skip
    assert shapes == {
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (50, 768),
        "visual.proj": (768, 768),
        **{f"visual.{norm}.{part}": (768,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")},
        **{f"visual.transformer.resblocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()},
    }


def test_converting_again_is_harmless_and_never_overwrites(teacher: Path, tmp_path: Path) -> None:
    checkpoint, out = save(released(), tmp_path), tmp_path / "new" / "out"
    first = convert(checkpoint, str(out), teacher=f"local-dir:{teacher}")
    files = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert convert(checkpoint, str(out), teacher=f"local-dir:{teacher}") == first
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == files
    other = released()
    other["model"]["image_projection"] = other["model"]["image_projection"] + 1
    with pytest.raises(OutputExistsError, match="holds something else"):
        convert(save(other, tmp_path), str(out), teacher=f"local-dir:{teacher}")
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == files
    assert list(out.parent.iterdir()) == [out]


def test_a_write_that_fails_leaves_no_folder(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint, out = save(released(), tmp_path), tmp_path / "out"
    monkeypatch.setattr("dimefm.models.weights_file.save_file", full)
    with pytest.raises(StoreError, match="out cannot be written: No space left on device\n  remedy: "):
        convert(checkpoint, str(out), teacher=f"local-dir:{teacher}")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    monkeypatch.undo()
    convert(checkpoint, str(out), teacher=f"local-dir:{teacher}")
    assert loaded(out)


def test_a_converted_folder_is_evaluated(teacher: Path, cifar10: str, tmp_path: Path) -> None:
    convert(save(released(), tmp_path), str(tmp_path / "out"), teacher=f"local-dir:{teacher}")
    words = ["evaluate", str(tmp_path / "out"), cifar10, "--device", "cpu", "--out", str(tmp_path / "results")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "200 images" in result.output


# -- what is said of it -----------------------------------------------------------------------------------------------


def test_the_command_says_what_it_took_and_what_it_left(teacher: Path, tmp_path: Path) -> None:
    tower = make_tower(1e-12)
    content = FORMS["released, with text and head"][1](tower, tower.state_dict(), text_side(teacher))
    words = ["convert-checkpoint", save(content, tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*words, "--teacher", f"local-dir:{teacher}"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{tmp_path}/out: load it with open_clip as local-dir:{tmp_path}/out",
        "  image tower  ViT of 2 layers, width 128, patches of 16 px, images of 32 px, projected to 64; "
        "LayerNorm epsilon 1e-12",
        f"  text tower   that of local-dir:{teacher}; nothing of it is taken from the checkpoint",
        f"  left out     {len(text_side(teacher)) + 2} of the checkpoint's tensors: "
        "ln_final.bias, ln_final.weight, logit_scale, ...",
    ]


def test_a_text_tower_of_another_teacher_is_noted(teacher: Path, tmp_path: Path) -> None:
    def converted(text: State) -> tuple[str, ...]:
        content = {"model": {**released()["model"], **text}}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        result = convert(save(content, tmp_path), str(tmp_path / "out"), teacher=f"local-dir:{teacher}")
        assert ("is it the teacher that the checkpoint was distilled from?" in result.show()) == bool(result.foreign)
        return result.foreign

    text = text_side(teacher)
    assert converted({name: value.half() for name, value in text.items()}) == ()
    changed = text["token_embedding.weight"].clone()
    changed[7, 7] += 0.01
    assert converted({**text, "token_embedding.weight": changed}) == ("token_embedding.weight",)
    assert converted({"text.token_embedding.weight": changed}) == ("text.token_embedding.weight",)
    assert converted({**text, "text_projection": torch.ones(3, 3)}) == ("text_projection",)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_texts_alone(teacher: Path, tmp_path: Path) -> None:
    what = refused({"model": text_side(teacher)}, teacher, tmp_path)
    assert what.startswith(" holds no image tower: its tensors are ")
    assert "(ln_final.bias, ln_final.weight, logit_scale, ...)" in what
    for content in ([1, 2], {"epoch": 3}, {"model": 3}):
        assert refused(content, teacher, tmp_path) == " holds no image tower: it holds no tensors by name"


@pytest.mark.parametrize("key", ["model", "image_state_dict"])
def test_a_swin_student(key: str, teacher: Path, tmp_path: Path) -> None:
    swin = {
        "image_encoder.patch_embed.proj.weight": torch.ones(96, 3, 4, 4),
        "image_encoder.layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(169, 3),
        "image_projection": torch.ones(768, EMBED),
    }
    what = refused({key: swin}, teacher, tmp_path)
    assert what.startswith(" holds a Swin student (3 (visual.patch_embed.proj.weight, visual.layers.0.blocks.0.attn")
    assert what.endswith("a tower that open_clip does not have")


@pytest.mark.parametrize("name", ["conv1.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight"])
def test_a_tower_without_what_tells_its_size(name: str, teacher: Path, tmp_path: Path) -> None:
    content = released()
    del content["model"][f"image_encoder.{name}"]
    what = refused(content, teacher, tmp_path)
    assert f" is not a ViT of CLIP's form: visual.{name} missing or of another shape; it holds " in what


def test_a_tower_without_a_projection(teacher: Path, tmp_path: Path) -> None:
    content = released()
    del content["model"]["image_projection"]
    assert "CLIP's form: visual.proj missing" in refused(content, teacher, tmp_path)
    content["model"] |= {"image_projection": torch.ones(WIDTH, EMBED), "visual.proj": torch.ones(WIDTH, EMBED)}
    assert "two projections, visual.proj and vision_projection" in refused(content, teacher, tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(teacher: Path, tmp_path: Path) -> None:
    content = released()
    block = "image_encoder.transformer.resblocks.0"
    for part in ("attn.in_proj_bias", "attn.in_proj_weight", "ln_2.bias", "ln_2.weight"):
        del content["model"][f"{block}.{part}"]
    content["model"][f"{block}.mlp.c_fc.bias"] = torch.ones(7)
    content["model"]["image_encoder.ln_mid.bias"] = torch.ones(7)
    place = "visual.transformer.resblocks.0"
    assert refused(content, teacher, tmp_path) == (
        f" is not a whole ViT of 32 tensors: missing 4 ({place}.attn.in_proj_bias, {place}.attn.in_proj_weight, "
        f"{place}.ln_2.bias, ...); unexpected 1 (visual.ln_mid.bias); of another shape 1 ({place}.mlp.c_fc.bias)"
    )


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("conv1.weight", (100, 3, 16, 16), "width 100 and 4 patches"),
        ("positional_embedding", (7, WIDTH), "width 128 and 6 patches"),
        ("positional_embedding", (0, WIDTH), "width 128 and -1 patches"),
        ("conv1.weight", (WIDTH, 3), "visual.conv1.weight missing or of another shape"),
    ],
)
def test_sizes_that_no_tower_has(name: str, shape: tuple[int, ...], what: str, teacher: Path, tmp_path: Path) -> None:
    content = released()
    content["model"][f"image_encoder.{name}"] = torch.ones(shape)
    assert f" is not a ViT of CLIP's form: {what}" in refused(content, teacher, tmp_path)


def test_a_teacher_of_another_width(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", embed=48)
    what = refused(released(), teacher, tmp_path, MismatchError)
    assert what == f" projects images to 64, local-dir:{teacher} texts to 48"


def test_a_teacher_with_another_activation(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", quick_gelu=False)
    assert f"has QuickGELU, local-dir:{teacher} has GELU" in refused(released(), teacher, tmp_path, MismatchError)


def test_what_is_no_checkpoint(teacher: Path, tmp_path: Path) -> None:
    for text in ("hello there", "<!doctype html>", ""):
        (tmp_path / "text").write_text(text)
        assert refused(tmp_path / "text", teacher, tmp_path) == " is not a file of torch.save"
    assert refused(tmp_path / "nowhere", teacher, tmp_path) == " does not exist"
    assert refused(teacher, teacher, tmp_path) == " is a folder"
    whole = Path(save(released(), tmp_path)).read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    assert refused(tmp_path / "half", teacher, tmp_path).startswith(" cannot be read: ")


def test_objects_are_never_unpickled(teacher: Path, tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (opened,)

    for trap in (Trap(), argparse.Namespace(epochs=3)):
        what = refused({**released(), "args": trap}, teacher, tmp_path)
        assert what.startswith(" holds more than tensors (")
        assert what.endswith("): reading it could run any code, so it is not read")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        arrays = {"model": {name: value.numpy() for name, value in released()["model"].items()}, "best": np.float64(1)}
        (tmp_path / "model.pkl").write_bytes(pickle.dumps([arrays, Trap()], protocol))
        assert " holds more than tensors (" in refused(tmp_path / "model.pkl", teacher, tmp_path)
    assert not opened.exists()
