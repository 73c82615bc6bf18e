"""`dimefm cache-images`, `cache-texts`, `import-embeddings` and `export-embeddings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dimefm.commands.options import require_with
from dimefm.commands.weights_options import weights_options
from dimefm.system.inert_text import say


def _cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """What cache-images and cache-texts share; put after the options of their own."""
    options: list[Callable[[Any], Any]] = [
        click.argument("sources", nargs=-1, required=True, metavar="SOURCE..."),
        click.option("--out", required=True, help="The store to write, a folder or URL ending in .zarr."),
        click.option("--teacher", required=True, help="open_clip model: NAME, hf-hub:ORG/MODEL or local-dir:FOLDER."),
        weights_options,
        click.option("--column", help="Column or field of tables and tars. Default: the one that fits."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Of the teacher's weights and products. Default: fp32 on a CPU, fp16 on a GPU.",
        ),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one."),
        click.option("--batch-size", type=click.IntRange(1), help="Default: 32 on CPU, 512 on GPU."),
        click.option("--shard-rows", type=click.IntRange(1), help="Rows of a unit of work. Default: by input size."),
        click.option(
            "--workers",
            type=click.IntRange(1),
            help="Teachers at work. Default: by cores or GPUs, memory and rows. One needs no Ray.",
        ),
        click.option("--ray-address", help="An existing Ray cluster. Default: a local Ray for this command alone."),
        click.option("--dry-run", is_flag=True, help="Print rows, bytes, hours and the teacher; write nothing."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@_cache_options
@click.option("--threads", type=click.IntRange(1), help="Decoding threads of a worker. Default: measured.")
@click.option("--compile", is_flag=True, help="torch.compile the image tower.")
@click.option(
    "--decoder",
    type=click.Choice(["fast", "pillow", "nvjpeg"]),
    default="fast",
    show_default=True,
    help="pillow: open_clip's own pixels; fast: within 2 of 255 of them; nvjpeg: on the GPU, less near.",
)
@click.option("--pixels", type=click.IntRange(8), metavar="SIDE",
              help="Also keep every image as a JPEG of this short side, for train-student to read.")  # fmt: skip
@click.option("--views", type=click.IntRange(1), help="Cache this many random crops of an image, not the whole.")
@click.option("--view-scale", type=click.FloatRange(0.01, 1),
              help="Least share of the area that a view shows. Default: 0.4.")  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="Read the rows again that have no embedding.")
@click.option("--accept-missing", is_flag=True,
              help="Leave out images whose file is gone or refused since it was planned. Default: stop.")  # fmt: skip
def cache_images(**options: Any) -> None:
    """Write the teacher's embedding of every image to a store.

    SOURCE: WebDataset tars, Parquet files with an image column, .tsv files of key and base64, image files; globs of
    these, ranges such as {000..009}.tar, and folders; all as local paths or as URLs (s3://...). Whatever lies there and
    is not used is counted, with an example.
    """
    require_with("--view-scale", options["view_scale"], "--views", options["views"])
    if options["view_scale"] is None:
        del options["view_scale"]
    if options["retry_failed"] and options["dry_run"]:
        raise click.UsageError("--dry-run says nothing of --retry-failed: dimefm info STORE --failures does")
    _cache("image", options)


@click.command()
@_cache_options
@click.option(
    "--min-words",
    type=click.IntRange(1),
    help="Leave shorter sentences out; of languages without spaces a few letters count as a word.",
)
@click.option("--max-words", type=click.IntRange(1), help="Leave longer sentences out.")
@click.option("--shuffle", type=click.IntRange(0), metavar="SEED", help="Rows in a random order: reads are then draws.")
def cache_texts(**options: Any) -> None:
    """Write the teacher's embedding of every sentence to a store, repeated ones once.

    SOURCE: .txt (one sentence a line), .jsonl, .json, .csv, .tsv (also .gz) and Parquet files, tars with .txt members,
    folders of one kind of them, or labelled sets, whose prompts (every class name in every template) are cached; all as
    local paths or as URLs (s3://...). Whatever lies there and is not used is counted, with an example.
    """
    _cache("text", options)


def _cache(kind: Any, options: dict[str, Any]) -> None:
    from dimefm.inspection.info import describe
    from pipeline.cache import CacheConfig, cache, dry_run

    dry = options.pop("dry_run")
    config = CacheConfig(kind=kind, **options)
    say(dry_run(config) if dry else describe(cache(config).path))


@click.command()
@click.argument("folder")
@click.option("--out", required=True, help="The store to write, ending in .zarr.")
@click.option("--kind", type=click.Choice(["image", "text"]), required=True, help="Of img_emb/, or of text_emb/.")
@click.option("--teacher", required=True, help="The open_clip model that made them, as for cache-images.")
@weights_options
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
              help="Of the teacher's matrix products, when it made them.")  # fmt: skip
@click.option("--images", "sources", multiple=True, metavar="SOURCE",
              help="The images they were made from, as for cache-images; may be repeated.")  # fmt: skip
@click.option("--check", type=click.IntRange(0), default=8, show_default=True,
              help="Rows that are encoded again and compared.")  # fmt: skip
@click.option("--match-parts", type=click.IntRange(1, 16), default=1, show_default=True,
              help="Last parts that a row's path must share with an image's, unless all is the same.")  # fmt: skip
@click.option("--accept", is_flag=True, help="Take embeddings that the teacher does not give.")
def import_embeddings(folder: str, **options: Any) -> None:
    """Make a store of embeddings that were made before, as clip-retrieval writes them.

    FOLDER: img_emb/img_emb_N.npy or text_emb/text_emb_N.npy beside metadata/metadata_N.parquet. train-student reads the
    images too: a store of their embeddings serves it only if --images says where they are; retrieve needs none.
    """
    from dimefm.exchange.import_embeddings import ImportConfig
    from dimefm.exchange.import_embeddings import import_embeddings as run
    from dimefm.inspection.info import describe

    store = run(ImportConfig(folder=folder, **options), lambda line: say(line, err=True))
    say(describe(store.path))


@click.command()
@click.argument("store", metavar="STORE.zarr")
@click.option("--out", required=True, help="The folder to write.")
@click.option("--rows-per-file", type=click.IntRange(1), help="Rows of the store in a file. Default: those of a shard.")
def export_embeddings(store: str, out: str, rows_per_file: int | None) -> None:
    """Write a store's embeddings as clip-retrieval does: img_emb/ or text_emb/ beside metadata/.

    Rows without an embedding are left out; the column `row` says which ones are there.
    """
    from dimefm.exchange.clip_retrieval_folder import export_embeddings as run

    say(f"{run(store, out, rows_per_file=rows_per_file)}: embeddings as .npy, metadata as .parquet")
