"""`cache-images` and `cache-texts` as one call. All that is named is looked at before torch is imported and the teacher
is loaded; pipeline.cache_job does the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache_schemas import EmbeddingStore, StrongViews, ViewPlan
from cache_schemas.embedding_store import Decoder, Kind
from cache_schemas.identity import Precision
from cache_schemas.views import Augment
from dimefm.caching.same_command import arguments_there, require_no_stranger
from dimefm.errors import DimefmError, TeacherError
from dimefm.models.names import TIMM
from dimefm.models.trained import Trained
from dimefm.sources.base import Source, paths_of
from dimefm.sources.captions import CaptionField
from dimefm.sources.files import expand
from dimefm.store.captions import captions_out
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import is_planned
from dimefm.system import storage
from dimefm.system.named_paths import allowing
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from pipeline.workers import require_cores


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """One job of stage 1: which images or sentences, which teacher, and how it runs. None: chosen by the machine or the
    source, or not asked for."""

    kind: Kind
    """What the sources hold: "image" or "text"."""
    sources: tuple[str | Source[Any], ...]
    """Files, globs of them, ranges such as {000..009}.tar, and folders, as local paths or URLs; or objects that follow
    the protocol `sources.base.Source`."""
    out: str
    """Store to write: a folder or URL, such as IMAGES.zarr or TEXTS.zarr."""
    teacher: str
    """Teacher, an open_clip model: NAME, hf-hub:ORG/MODEL or local-dir:FOLDER. For images also timm:NAME, a model of
    timm without a text tower."""
    pretrained: str | None = None
    """Weights of a plain NAME: an open_clip tag or a file."""
    trained: Trained | None = None
    """What weights in a file do not say of themselves: their preprocessing and activation."""
    column: str | None = None
    """Column of the tables, or field of the tars, to read. Default: the one that fits; of sentences the first of text,
    caption, sentence, TEXT and title."""
    captions: str | None = None
    """Also cache the captions of the images, several each where there are several. txt: the lines of KEY.txt beside the
    image, in its tar or folder; json:FIELD: a field of KEY.json; coco:FILE.json: COCO's annotations; else the column of
    a table, by its name, or in a .tsv by its number from 0."""
    captions_out: str | None = None
    """Store to write for the embeddings of `captions`, and whose they are. Default: IMAGES.captions.zarr beside
    IMAGES.zarr."""
    min_words: int | None = None
    """Leave out sentences with fewer words. In languages without spaces a few letters count as one word."""
    max_words: int | None = None
    """Leave out sentences with more words."""
    limit: int | None = None
    """Use only the first this many rows, in the order of the sources, and read no further. Shuffling comes after."""
    shuffle: int | None = None
    """Shuffle rows once with this seed, so that sequential reads are random samples. Default: no shuffling."""
    views: int | None = None
    """Cache this many random crops per image, instead of the whole image. More than a finished store has are added."""
    view_scale: float = 0.4
    """Smallest share of an image's area that a view shows."""
    view_seed: int = 0
    """Seed of the views."""
    augment: Augment = "crop"
    """What a view is. crop: a random crop, half of them flipped; strong: RandAugment and colour jitter besides."""
    view_operations: int = 2
    """Operations of RandAugment in a strong view, each left out half of the time."""
    view_magnitude: int = 9
    """How strong the operations of a strong view are, 0 to 10."""
    mixup: float | None = None
    """Mix each view with one of another image of its shard, by shares drawn from Beta(ALPHA, ALPHA). Default: none is
    mixed."""
    pixels: int | None = None
    """Also keep each image as a JPEG whose short side has this many pixels, for train-student to read."""
    decoder: Decoder = "fast"
    """How images are decoded. pillow: exactly open_clip's pixels; fast: within 2 of 255 of them; nvjpeg: on the GPU,
    less near."""
    precision: Precision | None = None
    """Number format of the teacher's weights and matrix products. Default: fp32 on a CPU, fp16 on a GPU."""
    device: str | None = None
    """Where the teacher runs. Default: cuda if there is a GPU, else cpu."""
    compile: bool = False
    """Compile the image tower with torch.compile."""
    batch_size: int | None = None
    """Images or sentences per batch. Default: 32 on a CPU, 512 on a GPU."""
    shard_rows: int | None = None
    """Rows per shard, the unit of work: what was not finished when a run stopped is done again. Default: by the size of
    the input."""
    workers: int | None = None
    """Number of teachers that run at once, at most one per core; one alone needs no Ray. Default: by cores or GPUs,
    memory, and whether the work is worth the start."""
    threads: int | None = None
    """Decoding threads per worker. Default: as many as a measurement shows to be of use."""
    ray_address: str | None = None
    """Address of an existing Ray cluster; needs `workers`. Default: a local Ray for this command alone."""
    retry_failed: bool = False
    """Read the rows that have no embedding again, once the store is finished."""
    accept_missing: bool = False
    """Leave out images whose file is gone or refused since the store was planned. Default: stop."""


def cache(config: CacheConfig) -> Store:
    """Run the job to its end, or go on where an earlier run stopped. Returns the finished store; with `captions` that
    of the images, and the one of the captions is finished too.

    With `accept_missing`, images whose file is gone or refused since they were planned stay without an embedding;
    otherwise they raise UnreadableError. Raises StoreError if no row of the finished store has an embedding, or if
    `retry_failed` mended none of the rows that had failed, and other DimefmErrors that the user can mend. Shards that
    were committed stay.

    >>> cache(CacheConfig(kind="text", sources=("captions.txt",), out="texts.zarr", teacher="local-dir:teacher"))
    """
    with allowing(paths_of(config.sources)):
        _require_possible(config, writes=True)
        from pipeline.cache_job import run_job  # imports torch and open_clip

        return run_job(config)


def dry_run(config: CacheConfig) -> str:
    """What `cache` would do, as text: rows, shards and bytes, the teacher's identity, and the hours that it would take
    by the speed that was measured on the first rows. Writes nothing."""
    _require_possible(config)
    from pipeline.cache_job import foresee

    return foresee(config)


def _require_possible(config: CacheConfig, *, writes: bool = False) -> None:
    """Raises DimefmError for sources that do not exist, an output that is something else, and options that do not go
    with each other. Then says what begins."""
    require_name(config.out, "a store", ".zarr")
    if config.teacher.startswith(TIMM) and (config.kind == "text" or config.captions is not None):
        what = f"{config.teacher} has no text tower: it gives embeddings of images alone"
        alone = "leave --captions out" if config.captions is not None else "cache images with it"
        raise TeacherError(what, remedy=f"{alone}, and train with --loss cosine=1 and no --texts")
    _require_sources(config)
    outs = [config.out]
    if config.captions is not None:
        CaptionField.parse(config.captions)
        outs.append(captions_place(config))
        require_name(outs[1], "a store", ".zarr")
        if storage.absolute(outs[1]) == storage.absolute(config.out):
            what = f"--captions-out {outs[1]} is the --out of the images"
            raise DimefmError(what, remedy="give it another name, or leave it out")
    elif config.captions_out is not None:
        raise DimefmError("captions_out has no effect without captions", remedy="give --captions too")
    if writes:
        for out in outs:
            require_no_stranger(out)  # before the lock is written into it
    if config.ray_address is None:
        require_cores(config.workers)
    elif config.workers is None:
        what = "--ray-address without --workers"
        raise DimefmError(what, remedy="give --workers: how many of the cluster's GPUs or cores to use")
    if config.decoder == "nvjpeg" and (config.views or config.pixels):
        what = "--decoder nvjpeg goes with neither --views nor --pixels, which are made on the CPU"
        raise DimefmError(what, remedy="give --decoder fast")
    view_plan(config)
    begun = earlier_schema(config)
    note(f"{'going on with' if begun else 'planning'} {config.out}: loading the teacher ...")


def captions_place(config: CacheConfig) -> str:
    """Where the store of captions goes."""
    return config.captions_out or captions_out(config.out)


def _require_sources(config: CacheConfig) -> None:
    if config.accept_missing:
        arguments_there(config.out, config.sources)
        return
    for argument in paths_of(config.sources):
        expand(argument)


def view_plan(config: CacheConfig) -> ViewPlan | None:
    """The views that a config asks for. Raises DimefmError where they cannot be, or something is asked of them but no
    view is."""
    if not config.views:
        if config.augment != "crop" or config.mixup:
            what = f"{'--mixup' if config.mixup else '--augment'} has no effect without --views"
            raise DimefmError(what, remedy="say how many views to cache, such as --views 4")
        return None
    strong = StrongViews(operations=config.view_operations, magnitude=config.view_magnitude)
    plan = ViewPlan(
        count=config.views,
        seed=config.view_seed,
        crop_scale=(config.view_scale, 1.0),
        flip=True,
        strong=strong if config.augment == "strong" else None,
        mixup=config.mixup or 0.0,
    )
    if problems := plan.problems():
        raise DimefmError(f"views: {'; '.join(map(str, problems))}", remedy="give another value")
    return plan


def earlier_schema(config: CacheConfig) -> EmbeddingStore | None:
    """The schema of the store that an earlier run began, if there is one: the store keeps its precision and batch size
    on any machine."""
    return Store(config.out).schema if is_planned(config.out) else None
