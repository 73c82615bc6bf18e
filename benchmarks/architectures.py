"""Every architecture that open_clip lists, as a teacher and as a student: which are taken, and why others are not.

Models are built without memory, on torch's meta device, and shown a batch there. Nothing is downloaded: what needs
something from the Hub is said to, and is as far tried as it can be without.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import open_clip
import timm
import torch

from benchmarks.measure import table
from cache_schemas import Preprocessing, TeacherIdentity
from dimefm.errors import DimefmError
from dimefm.models.hub import require_plain_tokenizer
from dimefm.models.towers import build_student, build_text_student, student_spec, text_spec
from dimefm.system.markdown_table import markdown_table

OUT = Path(__file__).parents[1] / "docs" / "architectures.md"
HEAD = ("architecture", "px", "width", "image tower", "text tower", "teacher", "student", "text student")
TEXT = """# Architectures

What open_clip {open_clip} (with timm {timm}) lists, each built with random weights on torch's meta device and shown a
batch of two. Written by `python -m benchmarks architectures`; nothing is downloaded for it.

- **width**: of the embeddings. **image tower**, **text tower**: parameters in millions.
- **teacher**: `--teacher NAME --pretrained TAG` for `cache-images` and `cache-texts`; `open_clip.list_pretrained()` has
  the tags. **student**: `--student NAME`. **text student**: `--text-student NAME`. Students are tried at their own
  width and at another one, as if for a teacher of another kind.
- **tokenizer X**: the tokenizer is fetched from the Hub once, as X, which needs `pip install "dimefm[hf]"`.
  **text tower X**: the config of the text tower is fetched from the Hub too; such towers have not been tried here.

{rows}
"""


@dataclass(frozen=True)
class Examined:
    """An architecture: pixels a side, width of its embeddings, parameters of its towers (0: not known without the Hub),
    and for each use `yes`, what it needs, or `no` and why."""

    name: str
    pixels: int
    width: int
    image_parameters: int
    text_parameters: int
    teacher: str
    student: str
    text_student: str

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        sizes = (f"{count / 1e6:.0f}" if count else "" for count in (self.image_parameters, self.text_parameters))
        return (self.name, str(self.pixels), str(self.width), *sizes, self.teacher, self.student, self.text_student)


def examine(name: str) -> Examined:
    """Build it as a teacher and as both kinds of student, without memory."""
    cfg = open_clip.get_model_config(name)
    text, width = cfg["text_cfg"], cfg["embed_dim"]
    tower, tokenizer = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    teachers = [_teacher(width), _teacher(512 if width != 512 else 768)]
    image_towers, text_towers = list[Any](), list[Any]()
    with torch.device("meta"):
        student = _tried(lambda: image_towers.extend(build_student(student_spec(name, one)) for one in teachers))
        if tower:
            needs = f"text tower {tower}"
            return Examined(
                name,
                _pixels(cfg),
                width,
                _count(image_towers),
                0,
                f"not tried: {needs}",
                student,
                f"not tried: {needs}",
            )
        needs = f"; tokenizer {tokenizer}" if tokenizer else ""
        text_student = _tried(lambda: text_towers.extend(_text_tower(name, one) for one in teachers))
        teacher = _tried(lambda: _encode(name, cfg))
    return Examined(
        name,
        _pixels(cfg),
        width,
        _count(image_towers),
        _count(text_towers),
        teacher + needs * (teacher == "yes"),
        student,
        text_student + needs * (text_student == "yes"),
    )


def _teacher(width: int) -> TeacherIdentity:
    """Any teacher of that width."""
    preprocessing = Preprocessing(
        size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="shortest"
    )
    return TeacherIdentity(
        name="any", pretrained=None, weights="", activation="gelu", preprocessing=preprocessing, tokenizer="",
        context_length=77, embed_dim=width, precision="fp32", logit_scale=100.0, logit_bias=None,
    )  # fmt: skip


def _tried(build: Callable[[], object]) -> str:
    """`yes`, or why not. What is raised beside our own errors is a fault of ours, and stops everything."""
    try:
        build()
    except (DimefmError, AssertionError) as error:
        return f"no: {str(error).splitlines()[0]}"
    return "yes"


def _text_tower(name: str, teacher: TeacherIdentity) -> Any:
    spec = text_spec(name, teacher)
    tower = build_text_student(spec)
    features = tower(torch.zeros(2, spec.text_cfg["context_length"], dtype=torch.long))
    assert isinstance(features, torch.Tensor), "it gives more than an embedding for each sentence"
    assert features.shape == (2, spec.embed_dim), f"its embeddings are {tuple(features.shape)[1:]} wide"
    return tower


def _encode(name: str, cfg: dict[str, Any]) -> None:
    """Embeddings of two images and two sentences, as dimefm.models.clip asks for them."""
    require_plain_tokenizer(name, cfg)
    model: Any = open_clip.create_model(name, device="meta")
    size, length = open_clip.get_model_preprocess_cfg(model)["size"], cfg["text_cfg"]["context_length"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    for features in (
        model.encode_image(torch.zeros(2, 3, *sides)),
        model.encode_text(torch.zeros(2, length, dtype=torch.long)),
    ):
        assert features.shape == (2, cfg["embed_dim"]), f"its embeddings are {tuple(features.shape)[1:]} wide"


def _pixels(cfg: dict[str, Any]) -> int:
    size = cfg["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _count(towers: list[Any]) -> int:
    """Parameters of the first, which is of the architecture's own width."""
    return sum(parameter.numel() for parameter in towers[0].parameters()) if towers else 0


def written(rows: list[Examined]) -> str:
    """The page, as Markdown."""
    lines = markdown_table([HEAD, *(row.cells() for row in rows)])
    return TEXT.format(open_clip=open_clip.__version__, timm=timm.__version__, rows="\n".join(lines))


@click.command()
@click.option("--out", default=str(OUT), show_default="docs/architectures.md", help="The page to write.")
@click.option("--models", help="Only these, separated by commas: shown, and nothing is written.")
def architectures(out: str, models: str | None) -> None:
    """Which architectures of open_clip are teachers and students; writes docs/architectures.md."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # open_clip's, that weights are random
    rows = []
    for name in models.split(",") if models else open_clip.list_models():
        rows.append(examine(name))
        click.echo("  ".join(rows[-1].cells()))
    if models:
        click.echo(table(HEAD, [row.cells() for row in rows]))
        return
    Path(out).parent.mkdir(exist_ok=True)
    Path(out).write_text(written(rows), encoding="utf-8")
    refused = [row.name for row in rows if "no:" in row.teacher + row.student + row.text_student]
    click.echo(f"{out}: {len(rows)} architectures, of which {len(refused)} are refused as something")
