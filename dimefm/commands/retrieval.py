"""`dimefm build-index`, `retrieve`, `search` and `select-texts`."""

from __future__ import annotations

from typing import Any

import click

from dimefm.commands.options import Bytes, require_with
from dimefm.system.inert_text import say


@click.command()
@click.argument("store", metavar="STORE.zarr")
@click.option("--out", required=True, help="The folder to write, ending in .index.")
@click.option("--queries", help="An image store: tune and measure the recall with its embeddings, as retrieve asks.")
@click.option("--recall", "recall_target", type=click.FloatRange(0, 1), default=0.95, show_default=True,
              help="Recall@10 to reach, against exact search.")  # fmt: skip
@click.option("--accept", is_flag=True, help="Keep an index that stays below --recall.")
@click.option("--factory", help="FAISS factory string. Default: by rows and memory.")
@click.option("--memory", type=Bytes(), metavar="SIZE", help="Of each process, such as 12GB. Default: half of all.")
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
    from dimefm.inspection.info import describe
    from dimefm.retrieval.build_index import IndexConfig, preview_build
    from dimefm.retrieval.build_index import build_index as build

    require_with("--ray-address", ray_address, "--workers", workers)
    config = IndexConfig(**options)
    if dry_run:
        say(preview_build(config).show())
        return
    run = None
    if workers and (workers > 1 or ray_address):
        from pipeline.ray_index_parts import on_ray

        run = on_ray(workers, ray_address)
    build(config, run, lambda line: say(line, err=True))
    say(describe(options["out"]))


@click.command()
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
    from dimefm.inspection.info import describe
    from dimefm.retrieval.retrieve import retrieve as run

    if options["index"] and options["device"]:
        raise click.UsageError("--device has no effect with --index: an index searches on the CPU")
    run(images, **options)
    say(describe(options["out"]))


@click.command()
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
    from dimefm.retrieval.search import search as run
    from dimefm.retrieval.search import show

    queries = [*options["images"], *options["texts"]]
    if not queries:
        raise click.UsageError("give --image FILE or --text SENTENCE")
    require_with("--pretrained", options["pretrained"], "--teacher", options["teacher"])
    say("\n\n".join(map(show, queries, run(path, **options))))


@click.command()
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
    from dimefm.inspection.info import describe
    from dimefm.selection.select_texts import SelectionConfig
    from dimefm.selection.select_texts import select_texts as select

    select(SelectionConfig(**options))
    say(describe(options["out"]))
