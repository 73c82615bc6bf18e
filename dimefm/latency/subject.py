"""What is measured: a model in one way of running it. It is chosen here without torch, and loaded in its own process.

Shapes: B images or sentences, L tokens, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cache_schemas.identity import Precision
from cache_schemas.latency import Backend, Tower
from cache_schemas.run import RUN_FILE
from dimefm.errors import TeacherError
from dimefm.latency.config import LatencyConfig
from dimefm.models.exported import NEEDS, bytes_of_weights, format_of, read_export, require_packages
from dimefm.models.names import CONFIGURED, FOLDER, require_model, tags
from dimefm.models.trained import Trained
from dimefm.training.run_folder import read_run

if TYPE_CHECKING:
    from dimefm.models.clip import Clip


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model as `evaluate` names it, and how it is run. `name` is what people call it. A teacher is named by its
    `run`. An ONNX model has its own precision."""

    name: str
    model: str
    pretrained: str | None
    run: str | None
    backend: Backend
    device: str | None
    precision: Precision

    def __str__(self) -> str:
        return f"{self.name} ({self.backend})"

    @property
    def libraries(self) -> list[str]:
        """Modules that its process needs, which take seconds to import."""
        return ["dimefm.models.onnx_towers"] if self.backend in ("onnx", "int8") else ["dimefm.evaluation.open_model"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model once it is loaded, as in ModelLatency; `device` is the name of a GPU."""

    weights: str
    precision: Precision
    device: str
    parameters: int
    image_parameters: int
    image_flops: int | None
    text_flops: int | None
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready. `inputs` makes the input of a tower for a batch, `calls` take it; `wait` waits until the
    device has done all that it was given."""

    facts: Facts
    inputs: Callable[[Tower, int], Any]
    calls: dict[Tower, Callable[[Any], object]]
    wait: Callable[[], None]


def subjects(config: LatencyConfig) -> list[Subject]:
    """All that is to be measured. Raises a DimefmError for a model that does not exist."""
    named: dict[tuple[str, str | None], _Named] = {}
    for one in (one for model in config.models for one in _named(model, config.with_teacher)):
        if one.run is None or (one.model, one.tag) not in named:  # what the user names is named by no run
            named[one.model, one.tag] = one
    names = _short([f"{model}:{tag}" if tag else model for model, tag in named])
    return [
        Subject(
            name=name,
            model=one.model,
            pretrained=one.tag,
            run=one.run,
            backend=backend,
            device="cpu" if backend in ("onnx", "int8") else config.device,
            precision=config.precision,
        )
        for one, name in zip(named.values(), names, strict=True)
        for backend in _backends(one.model, one.tag, config.compiled and not one.run)
    ]


class _Named(NamedTuple):
    """A model, its tag, and the run that names it as its teacher."""

    model: str
    tag: str | None = None
    run: str | None = None


def _named(model: str, with_teacher: bool) -> Iterator[_Named]:
    """What the user means by MODEL, and with it, if wanted, the teacher of a run."""
    if Path(model).exists() or model.startswith(CONFIGURED):
        yield _Named(model.rstrip("/"))
        if with_teacher and Path(model, RUN_FILE).exists():
            teacher = read_run(model).teacher
            yield _Named(teacher.name, teacher.pretrained, model)
    else:
        name, _, tag = model.partition(":")
        yield _Named(name, tag or None)


def _backends(model: str, tag: str | None, compiled: bool) -> list[Backend]:
    """The ways in which a model can run. Raises a DimefmError for one that does not exist."""
    folder = model.removeprefix(FOLDER)
    form = format_of(folder)
    if form is None and not Path(folder, RUN_FILE).exists():
        if tag is None and (known := tags(model.replace("/", "-"))):
            what = f"no weights named for {model}"
            raise TeacherError(
                what, remedy=f"name them after a colon, with a tag such as {model}:{known[0]}, or a file"
            )
        require_model(model, tag, folder="")
    elif form is not None:
        require_packages(NEEDS[form], f"the {form} model {folder}")
    if form == "onnx":
        facts = read_export(folder).onnx
        return ["int8" if facts and facts.quantized else "onnx"]
    return ["pytorch", "compiled"] if compiled else ["pytorch"]


def _short(names: list[str]) -> list[str]:
    """The last parts of paths, where these tell the models apart."""
    last = [Path(name.removeprefix(FOLDER)).name for name in names]
    return last if len(set(last)) == len(set(names)) else names


@contextmanager
def loading(subject: Subject, threads: int) -> Iterator[Loaded]:
    """The model, ready to compute on so many threads."""
    if subject.backend in ("onnx", "int8"):
        yield _onnx(subject.model.removeprefix(FOLDER), threads)
        return
    import torch

    from dimefm.evaluation.open_model import open_model
    from dimefm.models.hub import require_cached

    torch.set_num_threads(threads)
    known = None
    if subject.run:
        require_cached(subject.model, subject.run)
        known = read_run(subject.run).teacher
    trained = Trained(assume_openai=True) if subject.pretrained and Path(subject.pretrained).is_file() else None
    with open_model(
        subject.model, subject.pretrained, trained=trained, known=known, precision=subject.precision,
        device=subject.device,
    ) as clip:  # fmt: skip
        yield _pytorch(subject, clip)


def _onnx(folder: str, threads: int) -> Loaded:
    import numpy as np

    from dimefm.models.onnx_towers import OnnxTowers

    towers = OnnxTowers(folder, threads)
    export, (height, width) = towers.export, towers.export.model.preprocessing.size

    def inputs(tower: Tower, batch: int) -> Any:
        if tower == "text":
            return towers.tokenize([_sentence(export.model.context_length)] * batch)
        return np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), np.uint8)

    facts = Facts(
        weights=export.model.weights,
        precision=export.model.precision,
        device="cpu",
        parameters=export.parameters,
        image_parameters=export.image_parameters,
        image_flops=export.image_flops,
        text_flops=export.text_flops,
        bytes=bytes_of_weights(folder),
    )
    return Loaded(
        facts=facts,
        inputs=inputs,
        calls={"image": towers.encode_images, "text": towers.encode_tokens},
        wait=lambda: None,
    )


def _pytorch(subject: Subject, clip: Clip) -> Loaded:
    import torch

    from dimefm.models.flops import count_flops

    (height, width), cuda = clip.identity.preprocessing.size, clip.device.type == "cuda"

    def inputs(tower: Tower, batch: int) -> Any:
        if tower == "text":
            return clip.tokenize([_sentence(clip.identity.context_length)] * batch)
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=random)

    parameters, image_parameters = clip.parameter_counts()
    image_flops, text_flops = count_flops(clip)
    folder = subject.model.removeprefix(FOLDER)
    facts = Facts(
        weights=clip.identity.weights,
        precision=clip.identity.precision,
        device=torch.cuda.get_device_name(clip.device) if cuda else "cpu",
        parameters=parameters,
        image_parameters=image_parameters,
        image_flops=image_flops,
        text_flops=text_flops,
        bytes=bytes_of_weights(folder) if format_of(folder) else 4 * parameters,
    )
    if subject.backend == "compiled":
        for name in ("encode_image", "encode_text"):
            setattr(clip.model, name, torch.compile(getattr(clip.model, name), dynamic=False))
    return Loaded(
        facts=facts,
        inputs=inputs,
        calls={"image": clip.encode_images, "text": clip.encode_tokens},
        wait=torch.cuda.synchronize if cuda else lambda: None,
    )


def _sentence(length: int) -> str:
    """One that fills the context: nothing of it is padding, which some would leave out and others compute."""
    return " ".join(["word"] * length)
