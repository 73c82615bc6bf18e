"""`dimefm export`: write a trained student in a format that others read, checked and with a model card."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schemas import TeacherIdentity
from cache_schemas.export import EXPORT_FILE, TOKENIZER_FILE, Export, ExportOrigin
from cache_schemas.run import RUN_FILE
from dimefm.errors import DimefmError, OutputExistsError, StoreError
from dimefm.export.card import CardConfig, write_card
from dimefm.export.config import ExportConfig
from dimefm.export.formats import FORMATS, Format, Written
from dimefm.export.origin import origin_of
from dimefm.models.exported import format_of, read_export, require_packages
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.notes import note
from dimefm.system.output_names import require_place
from dimefm.system.versions import versions
from dimefm.training.run_folder import read_run
from dimefm.training.student import require_checkpoint

if TYPE_CHECKING:
    from dimefm.models.clip import Clip


def export(source: str, out: str, **options: Any) -> str:
    """Write the student of a run, or the model of an open_clip folder, to `out`; `options` are fields of ExportConfig.

    The folder appears whole or not at all, and only if the written model agrees with the student. If one with the same
    bytes is there, it is left as it is. Raises StoreError for a run without a checkpoint, MismatchError for another
    teacher, OutputExistsError, and DimefmError for a model that the format cannot hold.
    """
    config = ExportConfig(source=source, out=storage.local(out, "an export"), **options)
    form = FORMATS[config.format]
    card = CardConfig(evaluation=config.evaluation, license=config.license, data_license=config.data_license)
    form.require()
    _require_free(config.out, form)
    if (Path(source) / RUN_FILE).exists():
        step, steps = require_checkpoint(source, config.checkpoint), read_run(source).steps
        if config.checkpoint == "last" and step < steps:
            note(f"{source} is unfinished: it has done {step:,} of {steps:,} steps")
        config = replace(config, checkpoint=str(step))  # a run that goes on may have another last one soon
        note(f"{source}, step {step:,}: loading the student ...")
    else:
        _require_folder(source)
        note(f"{source}: loading the model ...")
    with tempfile.TemporaryDirectory() as scratch, storage.publishing(config.out) as folder:
        _write(config, form, Path(scratch), folder)
        write_card(str(folder), card)
        if Path(config.out).exists():
            _keep(Path(config.out), folder, form)
            if card != CardConfig():
                write_card(config.out, card)
    return config.out


def _write(config: ExportConfig, form: Format, scratch: Path, folder: Path) -> None:
    """The whole of a folder."""
    from dimefm.export.check import check
    from dimefm.export.check_material import find_material
    from dimefm.models.clip import load_clip
    from dimefm.training.student import write_student

    material = find_material(config) if _changes_weights(config) else None
    source, teacher = Path(config.source), None
    if (source / RUN_FILE).exists():
        source = scratch / "student"
        chosen = {name: getattr(config, name) for name in ("checkpoint", "weights", "teacher", "pretrained")}
        teacher = write_student(config.source, str(source), **chosen)
    clip = load_clip(f"local-dir:{source}", precision="fp32", device="cpu")
    _require_finite(clip, config.source)
    with storage.writing_to(config.out):
        written = form.writer()(clip, source, folder, config)
        _write_tokenizer(clip, folder, config)
        files = {file.name: storage.digest_file(str(file)) for file in sorted(folder.iterdir())}
        document = replace(_document(clip, config, written, teacher), files=files)
        storage.write_json(str(folder / EXPORT_FILE), document.to_json())
    if material:
        document = replace(document, checks=check(clip, folder, material, config))
        storage.write_json(str(folder / EXPORT_FILE), document.to_json())


def _write_tokenizer(clip: Clip, folder: Path, config: ExportConfig) -> None:
    """Write tokenizer.json. An open_clip folder does without it where it must: open_clip has the tokenizer too."""
    from dimefm.models.tokenizer_file import write_tokenizer

    try:
        require_packages(("tokenizers",), TOKENIZER_FILE)
        write_tokenizer(clip.tokenizer, folder, clip.identity.context_length)
    except DimefmError as error:
        if config.format != "open_clip":
            raise
        install = f": {error.remedy}" if find_spec("tokenizers") is None else ""
        note(f"{TOKENIZER_FILE} is left out: {error.what}{install}")


def _changes_weights(config: ExportConfig) -> bool:
    """Whether the exported model is another than that of training, byte for byte."""
    return config.format != "open_clip" or config.precision != "fp32" or bool(config.check_on)


def _document(clip: Clip, config: ExportConfig, written: Written, teacher: TeacherIdentity | None) -> Export:
    from dimefm.models.flops import count_flops

    parameters, image_parameters = clip.parameter_counts()
    image_flops, text_flops = count_flops(clip)
    model = replace(
        clip.identity,
        name=Path(config.out).name,
        pretrained=None,
        weights=written.weights,
        precision=config.precision,
        preprocessing_from=None,
    )
    return Export(
        format=config.format,
        model=model,
        text_tower=written.text_tower,
        parameters=parameters,
        image_parameters=image_parameters,
        image_flops=image_flops,
        text_flops=text_flops,
        versions=versions(),
        origin=_origin(config, clip.identity.weights, teacher),
        onnx=written.onnx,
    )


def _origin(config: ExportConfig, weights: str, teacher: TeacherIdentity | None) -> ExportOrigin | None:
    """Where the model comes from: its run, of which it has the text tower of `teacher`; or what an earlier export
    recorded beside the same `weights`."""
    if teacher:
        return origin_of(config.source, int(config.checkpoint), config.weights, teacher)
    if not Path(config.source, EXPORT_FILE).exists():
        return None
    before = read_export(config.source)
    return before.origin if before.model.weights == weights else None


def _require_folder(source: str) -> None:
    found = format_of(source)
    if found is None:
        remedy = did_you_mean_path(source, "give the --out of train-student, or an open_clip folder")
        raise StoreError(f"{source} is neither a run folder nor a model", remedy=remedy)
    if found != "open_clip":
        remedy = "name the run that it was exported from, or an open_clip folder"
        raise StoreError(f"{source} is a model in the format {found} already", remedy=remedy)


def _require_finite(clip: Clip, source: str) -> None:
    broken = [name for name, value in clip.model.state_dict().items() if not value.isfinite().all()]
    if broken:
        what = f"{source} has weights that are NaN or infinite, first in {broken[0]} ({len(broken)} tensors)"
        earlier = "export an earlier checkpoint with --checkpoint STEP"
        raise DimefmError(what, remedy=earlier if Path(source, RUN_FILE).exists() else "export another model")


def _require_free(out: str, form: Format) -> None:
    """Raises OutputExistsError where something else than a model of this format is at `out`."""
    found = format_of(out)
    if found and found != form.name:
        raise OutputExistsError(f"{out} exists and holds a model in the format {found}", remedy="give another --out")
    require_place(out, form.files[0])


def _keep(out: Path, folder: Path, form: Format) -> None:
    """Leave the folder that is there, if its model has the same bytes, and add the files that it lacks. Raises
    OutputExistsError for another model."""
    names = [file.name for file in folder.iterdir() if file.name.startswith(form.files)]
    if any(not (out / name).exists() or not filecmp.cmp(out / name, folder / name, shallow=False) for name in names):
        raise OutputExistsError(f"{out} exists and holds another model", remedy="give another --out, or delete it")
    for file in folder.iterdir():
        if not (out / file.name).exists():
            file.rename(out / file.name)
    shutil.rmtree(folder)
