"""`dimefm select-texts`, `select-images` and `leaks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import click

from cache_schemas.evaluation import Suite
from cache_schemas.image_selection import ImageRanking
from cache_schemas.text_selection import Ranking
from dimefm.commands.help import Command
from dimefm.commands.options import (
    DEVICES,
    Names,
    json_option,
    options_of,
    quiet_option,
    ray_options,
    require_with,
    say_json,
    say_made,
    shard_runner,
)
from dimefm.models.names import require_model
from dimefm.system.inert_text import say

_selection_option = options_of("dimefm.selection.select_texts", "SelectionConfig")
_image_option = options_of("dimefm.selection.select_images", "ImageSelectionConfig")
_leaks_option = options_of("dimefm.leaks.find_leaks", "LeaksConfig")


@click.command(cls=Command)
@click.argument("pairs", metavar="PAIRS.zarr")
@_selection_option("--out", required=True)
@_selection_option("--by", type=click.Choice(get_args(Ranking)))
@_selection_option("--size", type=click.IntRange(1), metavar="N")
@_selection_option("--min-hits", type=click.IntRange(1), metavar="N")
@_selection_option("--min-score", type=float, metavar="X")
@_selection_option("--pool", type=click.IntRange(1), metavar="N")
@_selection_option("--dedup", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="COSINE")
@_selection_option("--balance", is_flag=True)
@_selection_option("--images-sample", type=click.IntRange(2), metavar="N")
@_selection_option("--seed", type=click.IntRange(0))
@_selection_option("--images")
@_selection_option("--texts")
@_selection_option("--scores", metavar="OTHER.selection")
@_selection_option("--without", metavar="LEAKS.selection")
@_selection_option("--device", type=DEVICES)
@ray_options("Processes that score, cluster and compare, on Ray. Default: none but this one.")
@quiet_option
@json_option
def select_texts(workers: int | None, ray_address: str | None, as_json: bool, **options: Any) -> None:
    """Select the sentences that are worth training on.

    They are visually grounded sentences of a text store, for train-student --selection.

    PAIRS.zarr: the nearest sentences of images, from retrieve. They name their image store and text store.

    The sentences are ranked, by default by hits:

    \b
    --by hits        by how many images have them among their top k
    --by similarity  by how far their nearest images stand out from all others
    --by random      at random

    Then the options that are given apply in this order: --min-hits, --min-score, --pool, --dedup, --balance, --size.
    With --by hits and none of them, every sentence that at least one image has is kept.
    """
    from dimefm.selection.select_texts import SelectionConfig
    from dimefm.selection.select_texts import select_texts as select

    config = SelectionConfig(**options)
    run = shard_runner(workers, ray_address, config.device)
    require_with("--workers", workers, "--by similarity, --dedup or --balance", config.computes or None)
    select(config, run=run)
    say_made(options["out"], as_json)


@click.command(cls=Command)
@click.argument("images", metavar="IMAGES.zarr")
@_image_option("--out", required=True)
@_image_option("--by", type=click.Choice(get_args(ImageRanking)))
@_image_option("--exact", is_flag=True)
@_image_option("--near", metavar="STORE.zarr")
@_image_option("--near-sample", type=click.IntRange(2), metavar="N")
@_image_option("--drop-near", multiple=True, metavar="SENTENCE")
@_image_option("--drop-above", type=float, metavar="COSINE")
@_image_option("--top", type=click.IntRange(1), metavar="N")
@_image_option("--dedup", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="COSINE")
@_image_option("--balance", is_flag=True)
@_image_option("--size", type=click.IntRange(1), metavar="N")
@_image_option("--seed", type=click.IntRange(0))
@_image_option("--device", type=DEVICES)
@click.option("--teacher", help="For --drop-near: where the store's teacher is now, if it was moved.")
@click.option("--pretrained", help="Weights of --teacher: an open_clip tag or a file.")
@ray_options("Processes that score, cluster and compare, on Ray. Default: none but this one.")
@quiet_option
@json_option
def select_images(
    workers: int | None, ray_address: str | None, as_json: bool, teacher: str | None, pretrained: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Select the images that are worth training on.

    It is for train-student --image-selection. No image is encoded again.

    IMAGES.zarr: an image store, from cache-images.

    The images are ranked, by default by how typical they are of those that are alike. Then the options that are given
    apply in this order: --exact, --drop-near, --top, --dedup, --balance, --size. dimefm report shows pictures of what
    was kept and what was not.
    """
    require_with("--teacher", teacher, "--drop-near", options["drop_near"] or None)
    require_with("--pretrained", pretrained, "--teacher", teacher)
    if teacher:
        require_model(teacher, pretrained)
    from dimefm.selection.select_images import ImageSelectionConfig
    from dimefm.selection.select_images import select_images as select

    config = ImageSelectionConfig(**options)
    run = shard_runner(workers, ray_address, config.device)
    alone = config.ranking == "random" and config.dedup is None and not config.balance and not config.drop_near
    require_with("--workers", workers, "another --by, --dedup, --balance or --drop-near", None if alone else True)
    select(config, _encoder(config.images, teacher, pretrained, config.device), run)
    say_made(options["out"], as_json)


@click.command(cls=Command)
@click.argument("store", metavar="STORE.zarr")
@click.argument("folders", nargs=-1, metavar="[SET]...")
@_leaks_option("--out", required=True)
@click.option(
    "--suite",
    type=click.Choice([*get_args(Suite), "all"]),
    help="Look at the sets of this suite that are found below --data. all: every set that dimefm knows.",
)
@click.option("--data", metavar="ROOT", help="Folder or URL that has a folder for each set.")
@click.option(
    "--sets",
    type=Names(),
    default=(),
    metavar="A,B",
    help="Look only at these sets of the suite; or, without one, at these sets or folders below --data.",
)
@_leaks_option("--cosine", type=click.FloatRange(-1, 1), metavar="COSINE")
@_leaks_option("--similarity", type=click.FloatRange(0, 1), metavar="X")
@_leaks_option("--nearest", type=click.IntRange(1), metavar="N")
@click.option("--teacher", help="Where the store's teacher is now, if it was moved.")
@click.option("--pretrained", help="Weights of --teacher: an open_clip tag or a file.")
@click.option("--device", type=DEVICES, help="Where test images are encoded and compared. Default: cuda if there is a "
              "GPU, else cpu.")  # fmt: skip
@quiet_option
@json_option
def leaks(
    store: str, folders: tuple[str, ...], suite: Any, data: str | None, sets: tuple[str, ...],
    teacher: str | None, pretrained: str | None, device: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Find training images, or sentences, that stand in a test set.

    The store's teacher encodes the test images. The training images nearest to each are compared with it pixel by
    pixel: resized, cropped, mirrored or brightened copies are found too. All others are written as a selection, for
    train-student --image-selection; evaluate --leaks gives the accuracy on the test images that do not leak.

    Of a text store the sentences are compared with the captions of the sets; select-texts --without leaves them out.

    STORE.zarr: the store that is trained on, from cache-images or cache-texts.

    SET: a labelled set of your own, as for evaluate; or name known ones with --suite or --sets, and --data.
    """
    require_with("--pretrained", pretrained, "--teacher", teacher)
    if teacher:
        require_model(teacher, pretrained)
    from dimefm.evaluation.config import EvaluationConfig, choose_sets

    asked = EvaluationConfig(model="", folders=folders, suite=suite, data=data, sets=sets)
    chosen = choose_sets(asked)
    from dimefm.leaks.find_leaks import LeaksConfig, find_leaks
    from dimefm.leaks.report import as_text

    def load(store: Any) -> Any:
        from dimefm.retrieval.searched import load_teacher

        return load_teacher(store, teacher, pretrained, device)

    named = not suite or bool(sets)
    found = find_leaks(LeaksConfig(store=store, **options), chosen, data, load, device, named=named)
    say_json(found.to_json()) if as_json else say(as_text(found, options["out"]))


def _encoder(
    images: str, teacher: str | None, pretrained: str | None, device: str | None
) -> Callable[[Sequence[str]], Any]:
    """Encodes sentences with the teacher of a store."""

    def encode(sentences: Sequence[str]) -> Any:
        from dimefm.retrieval.searched import load_teacher
        from dimefm.store.embedding_store import Store

        return load_teacher(Store(images), teacher, pretrained, device).encode_texts(list(sentences)).cpu().numpy()

    return encode
