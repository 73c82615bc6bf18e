"""Options whose help is the line below a config's field, and kinds of options that several commands share."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import click
from click.core import ParameterSource

from cache_schemas.run import RUN_FILE
from dimefm.system import notes
from dimefm.system.inert_text import say
from dimefm.system.shard_work import ShardRunner, ShardWork, run_here

_Command = TypeVar("_Command", bound=Callable[..., Any])

DEVICES = click.Choice(["cpu", "cuda"])
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead, for programs.")


def _mute(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        notes.mute()
        ctx.call_on_close(lambda: notes.mute(False))  # another command may run in this process


quiet_option = click.option(
    "--quiet", "-q", is_flag=True, is_eager=True, expose_value=False, callback=_mute,
    help="Show no progress and no notes, only results, problems and errors.",
)  # fmt: skip
_UNITS = {None: 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class Field(NamedTuple):
    """A field of a config: the line below it, "" without one, and its default where that is a plain value."""

    words: str
    default: Any


@lru_cache
def fields_of(module: str, config: str) -> dict[str, Field]:
    """The fields of the dataclass `config`, read from the source of its module. Neither the module nor its package is
    imported: they may import torch, and help must be quick."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)  # of a dotted name it would import the package
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], *rest).with_suffix(".py").read_text(encoding="utf-8")
    found = re.search(rf"^class {config}\b.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"{module} has no class {config}")
    body = cast(ast.ClassDef, ast.parse(found[0]).body[0]).body  # the rest of the module need not be parsed
    return {
        node.target.id: Field(_words(below), _plain(node.value))
        for node, below in zip(body, [*body[1:], ast.Pass()], strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _is_class_variable(node)
    }


def _words(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _plain(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # a name or a call
        return None


def _is_class_variable(node: ast.AnnAssign) -> bool:
    return ast.unparse(node.annotation).startswith("ClassVar")


def options_of(module: str, config: str, *, defaults: bool = True) -> Callable[..., Callable[[_Command], _Command]]:
    """A `click.option` for the fields of a config. The name of the option, or its name in Python where that is another,
    is the field's; its help is the line below the field, with `other_field` shown as --other-field.

    With `defaults` it has the field's default too. Raises LookupError where the option is made, for a field that does
    not exist or has no line.
    """
    fields = fields_of(module, config)

    def option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
        name = next((name for name in names if not name.startswith("-")), names[0].lstrip("-").replace("-", "_"))
        if name not in fields or not fields[name].words:
            raise LookupError(f"{module}.{config} has no field {name!r} with a line below it")
        words, default = fields[name]
        help_ = re.sub(r"`(\w+)`", lambda found: f"--{found[1].replace('_', '-')}", words)
        if settings.get("multiple"):
            help_ += " May be repeated."
        if defaults and default is not None:
            settings = {"default": default, "show_default": True, **settings}
        return click.option(*names, help=help_, **settings)

    return option


def parse_bytes(text: str) -> int:
    """`12GB` or `800 MB` as bytes, at least one. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])?b)?", text.strip().lower())
    size = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size")
    return size


def was_given(name: str) -> bool:
    """Whether the user gave the option that has this name in Python, even if its value is the default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def require_run(model: str, *options: str) -> None:
    """Raises UsageError for `options`, by their names in Python, that were given for a model that is not a run."""
    if not Path(model, RUN_FILE).exists():
        for name in filter(was_given, options):
            raise click.UsageError(f"--{name} has no effect: {model} is not a run")


def require_with(option: str, value: object, needed: str, given: object) -> None:
    """Raises UsageError for an option that has no effect without another."""
    if value is not None and given is None:
        raise click.UsageError(f"{option} has no effect without {needed}")


def say_made(out: str, as_json: bool) -> None:
    """What `dimefm info` says of what was written."""
    from dimefm.inspection.info import examine

    made = examine(out)
    say_json(made.facts) if as_json else say(made.show())


def say_json(document: Any) -> None:
    """Print a document as JSON, in which no control character is left as it is. NaN and infinity, which JSON does not
    have, become null."""
    say(json.dumps(_finite(document), indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ray_options(workers: str) -> Callable[[_Command], _Command]:
    """--workers, with this help, and --ray-address, for `shard_runner`."""

    def options(command: _Command) -> _Command:
        address = "Address of an existing Ray cluster, for --workers. Default: a local Ray."
        command = click.option("--ray-address", help=address)(command)
        return click.option("--workers", type=click.IntRange(1), help=workers)(command)

    return options


def shard_runner(workers: int | None, ray_address: str | None, device: str | None = "cpu") -> ShardRunner:
    """What the options of `ray_options` ask for: this process, or workers on Ray, each on `device`; None: on GPUs where
    there are some. Raises UsageError and DimefmError for options that cannot be. Ray is imported when work begins."""
    from pipeline.workers import require_cores

    require_with("--ray-address", ray_address, "--workers", workers)
    if ray_address is None:
        require_cores(workers)
    if workers is None or (workers == 1 and ray_address is None):
        return run_here

    def run(
        work: ShardWork[Any, Any],
        units: Sequence[Any],
        say: Callable[[str], None] = notes.note,
        *,
        memory: int = 0,
    ) -> Iterator[Any]:
        from pipeline.ray_shards import on_ray

        return on_ray(workers, ray_address, device)(work, units, say, memory=memory)

    return run


class Bytes(click.ParamType[int]):
    """`12GB` as bytes."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError:
            self.fail(f"{value!r} is not a size such as 800MB or 12GB", param, ctx)


class Names(click.ParamType[tuple[str, ...]]):
    """`a,b` as a tuple of names."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else tuple(one for one in value.split(",") if one)


class Numbers(click.ParamType[tuple[int, ...]]):
    """`5,20` as a tuple of numbers."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(map(int, value if isinstance(value, (tuple, list)) else value.split(",")))
        except (ValueError, TypeError, AttributeError):
            self.fail(f"{value!r} is not a list of whole numbers such as 5,20,50", param, ctx)


class Weights(click.ParamType[tuple[float, ...]]):
    """`1::2` as a tuple of numbers, one for each of the stores in `A.zarr::B.zarr`."""

    name = "weights"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(map(float, value if isinstance(value, (tuple, list)) else value.split("::")))
        except (ValueError, TypeError, AttributeError):
            self.fail(f"{value!r} is not a weight for each store, such as 1::2", param, ctx)
