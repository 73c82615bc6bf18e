"""`dimefm cache-images`, `cache-texts`, `import-embeddings` and `export-embeddings`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, get_args

import click

from cache_schemas.embedding_store import Decoder, Kind
from cache_schemas.identity import Precision
from cache_schemas.views import MOST_VIEWS, Augment
from dimefm.commands.help import Command
from dimefm.commands.options import (
    DEVICES,
    options_of,
    quiet_option,
    ray_options,
    require_with,
    shard_runner,
    was_given,
)
from dimefm.commands.weights_options import weights_options
from dimefm.models.names import require_model
from dimefm.system.inert_text import say
from dimefm.system.notes import note

_option = options_of("pipeline.cache", "CacheConfig")
_import_option = options_of("dimefm.exchange.import_embeddings", "ImportConfig")
_parquet_option = options_of("dimefm.exchange.export_parquet", "ParquetConfig")


def _cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that cache-images and cache-texts share; they stand before each one's own."""
    options: list[Callable[[Any], Any]] = [
        click.argument("sources", nargs=-1, required=True, metavar="SOURCE..."),
        _option("--out", required=True),
        _option("--teacher", required=True),
        weights_options,
        _option("--column"),
        _option("--limit", type=click.IntRange(1), metavar="ROWS"),
        _option("--precision", type=click.Choice(get_args(Precision))),
        _option("--device", type=DEVICES),
        _option("--batch-size", type=click.IntRange(1)),
        _option("--shard-rows", type=click.IntRange(1)),
        _option("--workers", type=click.IntRange(1)),
        _option("--ray-address"),
        click.option("--dry-run", is_flag=True, help="Print rows, bytes, hours and the teacher, and write nothing."),
        quiet_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=Command)
@_cache_options
@_option("--captions", metavar="WHERE")
@_option("--captions-out", metavar="CAPTIONS.zarr")
@_option("--threads", type=click.IntRange(1))
@_option("--compile", is_flag=True)
@_option("--decoder", type=click.Choice(get_args(Decoder)))
@_option("--pixels", type=click.IntRange(8), metavar="SIDE")
@_option("--views", type=click.IntRange(1, MOST_VIEWS))
@_option("--view-scale", type=click.FloatRange(0.01, 1))
@_option("--augment", type=click.Choice(get_args(Augment)))
@_option("--mixup", type=click.FloatRange(0, min_open=True), metavar="ALPHA")
@_option("--retry-failed", is_flag=True)
@_option("--accept-missing", is_flag=True)
def cache_images(**options: Any) -> None:
    """Cache the teacher's embedding of each image.

    SOURCE: WebDataset tars, Parquet files with an image column, .tsv files of key and base64, or image files; globs of
    these, ranges such as {000..009}.tar, and folders. All may be local paths or URLs (s3://...). Files that are found
    there but not used are counted, with an example.
    """
    for name in ("view_scale", "augment", "mixup"):
        given = options[name] if was_given(name) else None
        require_with(f"--{name.replace('_', '-')}", given, "--views", options["views"])
    require_with("--captions-out", options["captions_out"], "--captions", options["captions"])
    if options["retry_failed"] and options["dry_run"]:
        raise click.UsageError("--dry-run says nothing about --retry-failed; dimefm info STORE --failures does")
    _cache("image", options)


@click.command(cls=Command)
@_cache_options
@_option("--min-words", type=click.IntRange(1))
@_option("--max-words", type=click.IntRange(1))
@_option("--shuffle", type=click.IntRange(0), metavar="SEED")
def cache_texts(**options: Any) -> None:
    """Cache the teacher's embedding of each sentence.

    A repeated sentence is cached once.

    SOURCE: .txt (one sentence per line), .jsonl, .json, .csv or .tsv files (also .gz), Parquet files, tars with .txt
    members, folders of one of these kinds, or labelled sets, whose prompts (every class name in every template) are
    cached. All may be local paths or URLs (s3://...). What is found there but not used is counted, with an example.
    """
    _cache("text", options)


def _cache(kind: Kind, options: dict[str, Any]) -> None:
    require_model(options["teacher"], options["pretrained"])
    from dimefm.inspection.info import describe
    from pipeline.cache import CacheConfig, cache, captions_place, dry_run

    dry = options.pop("dry_run")
    config = CacheConfig(kind=kind, **options)
    say(dry_run(config) if dry else describe(cache(config).path))
    if config.captions is not None and not dry:
        say(describe(captions_place(config)))


@click.command(cls=Command)
@click.argument("folder")
@_import_option("--out", required=True)
@_import_option("--kind", type=click.Choice(get_args(Kind)), required=True)
@_import_option("--teacher", required=True)
@weights_options
@_import_option("--precision", type=click.Choice(get_args(Precision)))
@_import_option("--images", "sources", multiple=True, metavar="SOURCE")
@_import_option("--check", type=click.IntRange(0), metavar="ROWS")
@_import_option("--limit", type=click.IntRange(1), metavar="ROWS")
@_import_option("--match-parts", type=click.IntRange(1, 16))
@_import_option("--accept", is_flag=True)
@ray_options("Shards to write at once, on Ray. Default: one after another.")
@quiet_option
def import_embeddings(folder: str, workers: int | None, ray_address: str | None, **options: Any) -> None:
    """Make a store of embeddings from clip-retrieval.

    FOLDER: img_emb/img_emb_N.npy or text_emb/text_emb_N.npy beside metadata/metadata_N.parquet. train-student reads the
    images too, so an image store serves it only if --images says where they are; retrieve does not need them.
    """
    require_model(options["teacher"], options["pretrained"])
    run = shard_runner(workers, ray_address)
    from dimefm.exchange.import_embeddings import ImportConfig
    from dimefm.exchange.import_embeddings import import_embeddings as make
    from dimefm.inspection.info import describe

    store = make(ImportConfig(folder=folder, **options), note, run)
    say(describe(store.path))


@click.command(cls=Command)
@click.argument("store", metavar="STORE.zarr")
@_parquet_option("--out", required=True)
@click.option(
    "--format", "format_", type=click.Choice(["clip-retrieval", "parquet"]), default="clip-retrieval",
    show_default=True, help="Layout to write.",
)  # fmt: skip
@_parquet_option("--rows-per-file", type=click.IntRange(1))
@_parquet_option("--pairs", metavar="PAIRS.zarr")
@_parquet_option("--clusters", type=click.IntRange(2, 100_000), metavar="N")
@_parquet_option("--map", is_flag=True)
@_parquet_option("--thumbnails", type=click.IntRange(8, 4096), metavar="SIDE")
@ray_options("Files to write at once, on Ray. Default: one after another.")
@quiet_option
def export_embeddings(
    store: str,
    out: str,
    format_: str,
    rows_per_file: int | None,
    workers: int | None,
    ray_address: str | None,
    **columns: Any,
) -> None:
    """Write embeddings for other programs.

    \b
    --format clip-retrieval  img_emb/ or text_emb/, with metadata/ beside it
    --format parquet         row, key, text or file, vector, and what is asked for

    pandas, DuckDB and Hugging Face's datasets read such Parquet. Rows without an embedding are left
    out; the column `row` says which rows were written.
    """
    if format_ == "clip-retrieval":
        for name, value in columns.items():
            require_with(f"--{name}", value or None, "--format parquet", None)
    elif PurePosixPath(out).suffix.lower() == ".parquet":
        for name, value in (("--rows-per-file", rows_per_file), ("--workers", workers)):
            if value:
                raise click.UsageError(f"{name} has no effect with one file: give a folder as --out")
    run = shard_runner(workers, ray_address)
    if format_ == "parquet":
        from dimefm.exchange.export_parquet import ParquetConfig, export_parquet

        config = ParquetConfig(store=store, out=out, rows_per_file=rows_per_file, **columns)
        say(f"{export_parquet(config, run)}: embeddings as .parquet")
        return
    from dimefm.exchange.export_embeddings import export_embeddings as export

    say(f"{export(store, out, rows_per_file=rows_per_file, run=run)}: embeddings as .npy, metadata as .parquet")
