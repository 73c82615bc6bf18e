"""Folders of exported models: which format one has, its document, and what loading it needs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from cache_schemas.export import EXPORT_FILE, TRANSFORMERS_CONFIG, Export, ExportFormat
from cache_schemas.identity import Precision
from cache_schemas.run import CONFIG_FILE
from dimefm.errors import DimefmError, StoreError, TeacherError
from dimefm.models.trained import Trained, option_of

NEEDS: dict[ExportFormat, tuple[str, ...]] = {
    "open_clip": (),
    "onnx": ("onnxruntime", "tokenizers"),
    "transformers": ("transformers",),
}
"""The packages that loading a format needs, beside those of dimefm itself."""


def format_of(folder: str) -> ExportFormat | None:
    """The format of a folder with a model, None for a folder without one."""
    if Path(folder, EXPORT_FILE).is_file():
        return read_export(folder).format
    if Path(folder, CONFIG_FILE).is_file():
        return "open_clip"
    return "transformers" if _is_clip_model(Path(folder, TRANSFORMERS_CONFIG)) else None


def _is_clip_model(config: Path) -> bool:
    """Whether a config is that of a CLIPModel of Hugging Face, whoever wrote it."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "clip"  # type: ignore[no-any-return]
    except (OSError, ValueError, AttributeError):
        return False


def read_export(folder: str) -> Export:
    """The document of an exported model. Raises StoreError where there is none, SchemaError for a damaged one."""
    from dimefm.system import storage  # it imports fsspec, and help must be quick

    where = storage.join(folder, EXPORT_FILE)
    return Export.parse(storage.read_json(where), where)


def require_whole(folder: str, export: Export, required: tuple[str, ...] = ()) -> None:
    """Raises StoreError if a file that export wrote is missing, or is not as it was written. Of a document that lists
    no files, those `required` must be there."""
    from dimefm.system import storage

    for name, digest in (export.files or dict.fromkeys(required, "")).items():
        file = storage.join(folder, name)
        if Path(name).name != name or not storage.exists(file):
            raise StoreError(f"{folder} is not whole: {name} is missing", remedy="export it again, or copy all of it")
        if digest and storage.digest_file(file) != digest:
            what = f"{file} is not what export wrote: it was changed or damaged"
            raise StoreError(what, remedy="export it again, or copy it again")


def require_packages(packages: tuple[str, ...], what: str) -> None:
    """Raises DimefmError unless all `packages`, which `what` needs, are installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise DimefmError(f"{what} needs {', '.join(missing)}", remedy='pip install "dimefm[export]"')


def require_as_exported(
    folder: str, *, device: str | None, precision: Precision | None = None, trained: Trained | None = None
) -> None:
    """Raises TeacherError for what cannot be chosen of an ONNX model: another device than the CPU, a number format (but
    fp32, which `evaluate` has by default), its preprocessing."""
    what = f"{folder} is an ONNX model"
    if device not in (None, "cpu"):
        raise TeacherError(f"{what}, which runs on the CPU here", remedy="give --device cpu")
    if precision not in (None, "fp32"):
        raise TeacherError(
            f"{what}, whose graphs have their number format: {precision} has no effect",
            remedy=f"leave --precision out, or export it again with --precision {precision}",
        )
    require_own_preprocessing(what, trained)


def require_own_preprocessing(what: str, trained: Trained | None) -> None:
    """Raises TeacherError for options that say how weights were trained, of a model whose folder says it."""
    if trained and trained.fields():
        given = ", ".join(map(option_of, trained.fields()))
        raise TeacherError(f"{what}, which has its preprocessing: {given} would have no effect", remedy="leave it out")
