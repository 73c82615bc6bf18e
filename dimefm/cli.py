"""The command line: each command parses its options and makes one library call."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from cache_schemas import SchemaError
from dimefm import __version__
from dimefm.errors import DimefmError, StoppedError
from dimefm.evaluation.command import compare, evaluate, sets, submission
from dimefm.inert import say, text
from dimefm.machine import wait_briefly
from dimefm.teacher_options import weights_options
from dimefm.train_command import train_student


class _Group(click.Group):
    """A group that shows a user's mistake as one message and exits with 1; anything else is a bug and is traced."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoppedError as error:
            say(f"Stopped: {error}", err=True)
            ctx.exit(128 + error.signal)  # as a shell reports it
        except KeyboardInterrupt:
            say("Stopped by Ctrl-C", err=True)
            ctx.exit(128 + signal.SIGINT)
        except (DimefmError, SchemaError) as error:
            raise click.ClickException(text(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # of a write, which names no file
                where = f"{error.filename}: " if error.filename else ""
                remedy = "make room, or mend the permissions, and run the same command again"
                raise click.ClickException(f"{text(where)}{error.strerror}\n  remedy: {remedy}") from error
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = "raise the limit (ulimit -n 4096) and run the same command again"
                raise click.ClickException(f"too many open files\n  remedy: {remedy}") from error
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            remedy = "check the path, its permissions and that the storage answers; then run the same command again"
            raise click.ClickException(text(f"{where}{error.strerror or error}\n  remedy: {remedy}")) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not have been imported
                raise
            what = str(error).partition(" GPU ")[0].strip()  # what follows are numbers of torch's allocator
            remedy = "give a smaller batch, or --device cpu; nvidia-smi says whether others use the GPU"
            raise click.ClickException(f"a GPU has too little memory: {what}\n  remedy: {remedy}") from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the work, not of the alphabet


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dimefm")
def cli() -> None:
    """Distil a large CLIP into a small student from unpaired images and sentences.

    Stage 1 runs the teacher once and caches its embeddings: cache-images, cache-texts. Pseudo texts are found with
    build-index and retrieve, and the sentences worth training on with select-texts. Stage 2, train-student, reads only
    the caches. Then evaluate and export.

    Every command can be stopped and run again: it goes on where it was, and does nothing where it had finished.
    """


def main() -> None:
    """Entry point of the `dimefm` command."""
    wait_briefly()
    if sys.stderr is not None:
        faulthandler.enable()  # a crash, as of a decoder or of a file that is cut while it is mapped, says where it was
    cli(prog_name="dimefm")


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


@cli.command()
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
    _require_with("--view-scale", options["view_scale"], "--views", options["views"])
    if options["view_scale"] is None:
        del options["view_scale"]
    if options["retry_failed"] and options["dry_run"]:
        raise click.UsageError("--dry-run says nothing of --retry-failed: dimefm info STORE --failures does")
    _cache("image", options)


@cli.command()
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


def _require_with(option: str, value: object, needed: str, given: object) -> None:
    """Refuses an option that has no effect without another."""
    if value is not None and given is None:
        raise click.UsageError(f"{option} has no effect without {needed}")


def _cache(kind: Any, options: dict[str, Any]) -> None:
    from dimefm.info import describe
    from pipeline.cache import CacheConfig, cache, dry_run

    dry = options.pop("dry_run")
    config = CacheConfig(kind=kind, **options)
    say(dry_run(config) if dry else describe(cache(config).path))


@cli.command()
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
    from dimefm.info import describe
    from pipeline.importing import ImportConfig
    from pipeline.importing import import_embeddings as run

    store = run(ImportConfig(folder=folder, **options), lambda line: say(line, err=True))
    say(describe(store.path))


class _Bytes(click.ParamType[int]):
    """`12GB` as bytes."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from dimefm.factory import parse_bytes

        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError:
            self.fail(f"{value!r} is not a size such as 800MB or 12GB", param, ctx)


@cli.command()
@click.argument("store", metavar="STORE.zarr")
@click.option("--out", required=True, help="The folder to write, ending in .index.")
@click.option("--queries", help="An image store: tune and measure the recall with its embeddings, as retrieve asks.")
@click.option("--recall", "recall_target", type=click.FloatRange(0, 1), default=0.95, show_default=True,
              help="Recall@10 to reach, against exact search.")  # fmt: skip
@click.option("--accept", is_flag=True, help="Keep an index that stays below --recall.")
@click.option("--factory", help="FAISS factory string. Default: by rows and memory.")
@click.option("--memory", type=_Bytes(), metavar="SIZE", help="Of each process, such as 12GB. Default: half of all.")
@click.option(
    "--workers", type=click.IntRange(1), help="Build so many parts at once, on Ray. Default: one after another."
)
@click.option("--ray-address", help="An existing Ray cluster for --workers. Default: a local Ray.")
@click.option("--partial", is_flag=True, help="Index what an unfinished store has so far; run again for the rest.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print what would be built, and when exact search is cheaper.")
def build_index(dry_run: bool, workers: int | None, ray_address: str | None, **options: Any) -> None:
    """Build a FAISS index over a store, tune it to a recall and measure it against exact search.

    Run again after rows were added to the store, it adds them.
    """
    from dimefm.building import IndexConfig, forecast
    from dimefm.building import build_index as build
    from dimefm.info import describe

    _require_with("--ray-address", ray_address, "--workers", workers)
    config = IndexConfig(**options)
    if dry_run:
        say(forecast(config).show())
        return
    run = None
    if workers and (workers > 1 or ray_address):
        from pipeline.index_parts import on_ray

        run = on_ray(workers, ray_address)
    build(config, run, lambda line: say(line, err=True))
    say(describe(options["out"]))


@cli.command()
@click.argument("images", metavar="IMAGES.zarr")
@click.option("--texts", required=True, help="The text store.")
@click.option("--index", help="An index over it, from build-index. Default: exact search.")
@click.option("--top-k", type=click.IntRange(1), default=16, show_default=True, help="Sentences for each image.")
@click.option("--out", required=True, help="The pseudo-text store to write, ending in .zarr.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Of exact search. Default: cuda where there is one.")
def retrieve(images: str, **options: Any) -> None:
    """Find the nearest sentences of every image, and so which sentences are visually grounded.

    Exact search suits a GPU, or a hundred thousand sentences; build-index --dry-run says which is cheaper.
    """
    from dimefm.info import describe
    from dimefm.retrieval import retrieve_stores

    if options["index"] and options["device"]:
        raise click.UsageError("--device has no effect with --index: an index searches on the CPU")
    retrieve_stores(images, **options)
    say(describe(options["out"]))


@cli.command()
@click.argument("path", metavar="STORE.zarr|STORE.index")
@click.option("--image", "images", multiple=True, metavar="FILE", help="What to search with; may be repeated.")
@click.option("--text", "texts", multiple=True, metavar="SENTENCE", help="What to search with; may be repeated.")
@click.option("--top-k", type=click.IntRange(1), default=10, show_default=True)
@click.option("--teacher", help="Where the teacher is now. Default: where it was.")
@click.option("--pretrained", help="Its tag or file, with a plain NAME.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
def search(path: str, **options: Any) -> None:
    """Print what an image or a sentence is nearest to, with cosine similarities.

    Over sentences it finds sentences, over images images: the fastest way to see that a cache is sane. A store is
    searched exactly, an index as retrieve does.
    """
    from dimefm.search import search as run
    from dimefm.search import show

    queries = [*options["images"], *options["texts"]]
    if not queries:
        raise click.UsageError("give --image FILE or --text SENTENCE")
    _require_with("--pretrained", options["pretrained"], "--teacher", options["teacher"])
    say("\n\n".join(map(show, queries, run(path, **options))))


@cli.command()
@click.argument("pairs", metavar="PAIRS.zarr")
@click.option("--out", required=True, help="The folder to write, ending in .selection.")
@click.option("--by", type=click.Choice(["hits", "similarity", "random"]), default="hits", show_default=True,
              help="What ranks sentences.")  # fmt: skip
@click.option("--size", type=click.IntRange(1), metavar="N", help="Keep the best N.")
@click.option("--min-hits", type=click.IntRange(1), metavar="N", help="Only those among the top k of N images or more.")
@click.option("--min-score", type=float, metavar="X", help="Only those that score X or more.")
@click.option("--pool", type=click.IntRange(1), metavar="N", help="Only the best N come to --dedup and --balance.")
@click.option("--dedup", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="COSINE",
              help="Leave out what is this near to a better one.")  # fmt: skip
@click.option("--balance", is_flag=True,
              help="The same cap on every cluster of similar sentences: the least that fills --size.")  # fmt: skip
@click.option("--images-sample", type=click.IntRange(2), metavar="N",
              help="Images that the similarity is to. Default: 16,384.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Of the draw, the samples and the clusters. Default: 0.")
@click.option("--images", help="Where the image store is now. Default: where it was.")
@click.option("--texts", help="Where the text store is now. Default: where it was.")
@click.option("--scores", metavar="OTHER.selection", help="Take the scores of another selection over the same stores.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
def select_texts(**options: Any) -> None:
    """Select the visually grounded sentences of a text store, for train-student --selection.

    PAIRS.zarr, from retrieve, names the stores. By hits: how many images have it among their top k; without more, all
    that any image has. By similarity: how far the images nearest to a sentence stand out from all others. Then, each if
    asked for and in this order: --min-hits, --min-score, --pool, --dedup, --balance, --size.
    """
    from dimefm.info import describe
    from dimefm.selection import SelectionConfig
    from dimefm.selection import select_texts as select

    select(SelectionConfig(**options))
    say(describe(options["out"]))


cli.add_command(train_student)


for _command in (evaluate, sets, compare, submission):
    cli.add_command(_command)


@cli.command()
@click.argument("run")
@click.option("--out", required=True, help="The folder to write.")
@click.option("--checkpoint", default="last", show_default=True, metavar="last|best|STEP", help="Of a run.")
@click.option("--weights", type=click.Choice(["model", "ema"]), default="model", show_default=True,
              help="Of a run: the weights, or their moving average.")  # fmt: skip
@click.option("--teacher", help="Where the teacher is now. Default: where it was when images were cached.")
@click.option("--pretrained", help="Its tag or file, with a plain NAME.")
def export(run: str, **options: Any) -> None:
    """Write a run's student, with its own text tower or the teacher's, as an open_clip folder.

    Load it with open_clip.create_model_and_transforms("local-dir:FOLDER").
    """
    from dimefm.export import export as write

    say(f"{write(run, **options)}: load it with open_clip as local-dir:{options['out']}")


@cli.command()
@click.argument("checkpoint")
@click.option("--out", required=True, help="The folder to write.")
@click.option("--teacher", required=True,
              help="open_clip model with the text tower: NAME, hf-hub:ORG/MODEL or local-dir:FOLDER.")  # fmt: skip
@weights_options
def convert_checkpoint(checkpoint: str, **options: Any) -> None:
    """Write a checkpoint of the authors of DIME-FM as an open_clip folder, with the teacher's text tower.

    CHECKPOINT: a ViT that they released, or that their training code saved; Swin students cannot be converted. Their
    teacher is --teacher ViT-L-14-quickgelu --pretrained openai. The folder is as export writes one, for evaluate and
    open_clip.create_model_and_transforms("local-dir:FOLDER").
    """
    from dimefm.convert import convert

    say(convert(checkpoint, **options).show())


@cli.command()
@click.argument("store", metavar="STORE.zarr")
@click.option("--out", required=True, help="The folder to write.")
@click.option("--rows-per-file", type=click.IntRange(1), help="Rows of the store in a file. Default: those of a shard.")
def export_embeddings(store: str, out: str, rows_per_file: int | None) -> None:
    """Write a store's embeddings as clip-retrieval does: img_emb/ or text_emb/ beside metadata/.

    Rows without an embedding are left out; the column `row` says which ones are there.
    """
    from pipeline.clip_retrieval import export_embeddings as run

    say(f"{run(store, out, rows_per_file=rows_per_file)}: embeddings as .npy, metadata as .parquet")


@cli.command()
def doctor() -> None:
    """Look at this machine: what would stop the work, what would slow it, and which defaults follow.

    Paste what it prints into a report of a problem. Exits with 1 if something would stop the work.
    """
    from dimefm.doctor import diagnose

    found = diagnose()
    say(found.show())
    if found.stops:
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("path")
@click.option("--failures", is_flag=True, help="List every row of a store that has no embedding, tab-separated.")
def info(path: str, failures: bool) -> None:
    """Describe a store, an index, a selection or a run."""
    from dimefm.info import describe, list_failures

    if not failures:
        say(describe(path))
        return
    for line in list_failures(path):
        say(line)


@cli.command()
@click.argument("store")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Encode N rows again and compare.")
@click.option("--teacher", help="For --sample: where the teacher is now. Default: where it was.")
@click.option("--pretrained", help="Its tag or file, with a plain NAME.")
@click.option("--repair", is_flag=True, help="Mark bad shards, so that the command that wrote them does them again.")
def verify(store: str, sample: int | None, teacher: str | None, pretrained: str | None, repair: bool) -> None:
    """Read every byte of a store and say whether it can be trusted; exits with 1 if not."""
    from pipeline.verify import VerifyConfig
    from pipeline.verify import verify as check

    _require_with("--teacher", teacher, "--sample", sample)
    _require_with("--pretrained", pretrained, "--teacher", teacher)
    report = check(VerifyConfig(store=store, sample=sample, teacher=teacher, pretrained=pretrained, repair=repair))
    say(report.show())
    if not report.trusted:
        raise click.exceptions.Exit(1)
