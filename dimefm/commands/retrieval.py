"""`dimefm build-index`, `retrieve`, `search` and `select-texts`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from dimefm.commands.help import Command
from dimefm.commands.options import (
    DEVICES,
    Bytes,
    json_option,
    options_of,
    quiet_option,
    ray_options,
    require_with,
    say_json,
    say_made,
    shard_runner,
)
from dimefm.models.exported import format_of
from dimefm.models.names import FOLDER, require_model
from dimefm.system.inert_text import line, say
from dimefm.system.notes import note

if TYPE_CHECKING:
    from dimefm.models.clip import Clip
    from dimefm.retrieval.searched import Student

_index_option = options_of("dimefm.retrieval.build_index", "IndexConfig")
_training_option = options_of("dimefm.training.config", "TrainConfig", defaults=False)
model_option = click.option(
    "--model",
    help="Student to search with in place of the teacher: a run or an exported folder, distilled from this teacher.",
)
_DEVICE = "Where exact search computes. Default: cuda if there is a GPU, else cpu."


@click.command(cls=Command)
@click.argument("store", metavar="STORE.zarr")
@_index_option("--out", required=True)
@_index_option("--queries")
@_index_option("--recall", "recall_target", type=click.FloatRange(0, 1))
@_index_option("--accept", is_flag=True)
@_index_option("--factory")
@_index_option("--memory", type=Bytes(), metavar="SIZE")
@ray_options("Parts to build at once, on Ray. Default: one after another.")
@_index_option("--partial", is_flag=True)
@_index_option("--seed", type=click.IntRange(0))
@click.option(
    "--dry-run", is_flag=True, help="Print what would be built, and when exact search is cheaper; build nothing."
)
@quiet_option
@json_option
def build_index(dry_run: bool, workers: int | None, ray_address: str | None, as_json: bool, **options: Any) -> None:
    """Build a FAISS index over a store, tuned to a recall.

    The recall is measured against exact search. If rows were added to the store, run the same command again: it adds
    them to the index.
    """
    from dimefm.retrieval.build_index import IndexConfig, preview_build
    from dimefm.retrieval.build_index import build_index as build

    run = shard_runner(workers, ray_address, None)
    config = IndexConfig(**options)
    if dry_run:
        preview = preview_build(config)
        say_json(preview.facts()) if as_json else say(preview.show())
        return
    build(config, run, note)
    say_made(config.out, as_json)


@click.command(cls=Command)
@click.argument("images", metavar="IMAGES.zarr")
@click.option("--texts", required=True, help="Text store to search.")
@click.option("--index", help="Index over the text store, from build-index. Default: exact search.")
@click.option("--top-k", type=click.IntRange(1), default=16, show_default=True, help="Sentences per image.")
@click.option("--out", required=True, help="Store of pairs to write: a folder or URL, such as PAIRS.zarr.")
@click.option("--device", type=DEVICES, help=_DEVICE)
@_training_option("--cache-dir", metavar="FOLDER")
@_training_option("--cache-size", type=Bytes(), metavar="SIZE")
@ray_options(
    "Workers on Ray, which share the images. With --index one for each machine is best: each holds the index in "
    "memory. Default: this process alone."
)
@click.option("--dry-run", is_flag=True, help="Print what it would take, by an index and exactly; retrieve nothing.")
@quiet_option
@json_option
def retrieve(
    images: str,
    workers: int | None,
    ray_address: str | None,
    dry_run: bool,
    as_json: bool,
    cache_dir: str | None,
    cache_size: int | None,
    **options: Any,
) -> None:
    """Find the nearest sentences of each image.

    These are its pseudo texts: nobody wrote them for it. Sentences that at least one image has are visually grounded.
    Exact search suits a GPU, or up to a hundred thousand sentences; build-index --dry-run says which is cheaper.
    """
    from dimefm.retrieval.retrieve import retrieve as run
    from dimefm.system.file_cache import caching_in

    if options["index"] and options["device"]:
        raise click.UsageError("--device has no effect with --index: an index searches on the CPU")
    runner = shard_runner(workers, ray_address, "cpu" if options["index"] else options["device"])
    require_with("--cache-size", cache_size, "--cache-dir", cache_dir)
    with caching_in(cache_dir, cache_size):
        if dry_run:
            from dimefm.retrieval.retrieve_cost import retrieve_cost

            named = options["texts"], options["index"]
            machines = workers if workers and ray_address else 1  # workers of a local Ray share this one
            cost = retrieve_cost(images, *named, workers=machines, device=options["device"])
            say_json(cost.facts()) if as_json else say(cost.show())
            return
        run(images, run=runner, **options)
    say_made(options["out"], as_json)


@click.command(cls=Command)
@click.argument("path", metavar="STORE.zarr|STORE.index")
@click.option("--image", "images", multiple=True, metavar="FILE", help="Image to search with. May be repeated.")
@click.option("--text", "texts", multiple=True, metavar="SENTENCE", help="Sentence to search with. May be repeated.")
@click.option("--top-k", type=click.IntRange(1), default=10, show_default=True, help="Results per image or sentence.")
@click.option("--teacher", help="Where the teacher is now. Default: where it was when the store was written.")
@options_of("dimefm.inspection.verify", "VerifyConfig")("--pretrained")
@model_option
@click.option(
    "--device", type=DEVICES, help="Where the model and the search run. Default: cuda if there is a GPU, else cpu."
)
@quiet_option
@json_option
def search(path: str, model: str | None, as_json: bool, **options: Any) -> None:
    """Print what is nearest to an image or a sentence.

    The results come with cosine similarities. A store or index of sentences gives sentences, one of images gives
    images: the fastest way to see that a cache is sane. A store is searched exactly, an index as retrieve searches it.
    """
    queries = [*options["images"], *options["texts"]]
    if not queries:
        raise click.UsageError("give --image FILE or --text SENTENCE")
    require_encoder(options["teacher"], options["pretrained"], model)
    from dimefm.retrieval.search import facts, show
    from dimefm.retrieval.search import search as run

    student = student_of(model, options["device"]) if model else None
    found = run(path, student=student, **options)
    if as_json:
        say_json([{**facts(*one), **({"model": model} if model else {})} for one in zip(queries, found, strict=True)])
        return
    if model:
        say(f"by embeddings of the student {line(model)}, not of its teacher\n")
    say("\n\n".join(map(show, queries, found)))


def require_encoder(teacher: str | None, pretrained: str | None, model: str | None) -> None:
    """Raises UsageError and DimefmError for what cannot encode queries."""
    require_with("--pretrained", pretrained, "--teacher", teacher)
    if teacher:
        require_model(teacher, pretrained)
    if model and teacher:
        raise click.UsageError("--teacher has no effect with --model, which searches in its place")


def student_of(model: str, device: str | None) -> Student:
    """The --model of `search` and `explore`. Raises DimefmError where it is no student."""
    from dimefm.retrieval.searched import Student
    from dimefm.training.student import distilled_from

    def load() -> AbstractContextManager[Clip]:
        from dimefm.evaluation.open_model import open_model

        on = "cpu" if format_of(folder) == "onnx" else device  # the search itself may be on a GPU
        return open_model(folder, device=on)

    folder = model.removeprefix(FOLDER)
    return Student(model, distilled_from(folder), load)
