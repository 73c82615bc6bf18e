"""The captions of images: a store of their embeddings, as of any sentences, and in it pairs that say whose they are."""

from __future__ import annotations

from dataclasses import dataclass

from cache_schemas.pairs import CAPTION_PAIRS
from dimefm.errors import StoreError
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.failures import require_embeddings
from dimefm.store.pairs_store import Pairs, require_pairs_match
from dimefm.system import storage


@dataclass(frozen=True)
class Captions:
    """`texts` are all captions, each once; `pairs` has for each image the rows of its own, best first by the teacher's
    score."""

    texts: Store
    pairs: Pairs


def open_captions(path: str, images: Store) -> Captions:
    """The finished captions of `images`. Raises StoreError where there are none or they are unfinished, MismatchError
    where they are those of other images, or of another teacher."""
    texts = Store(path)
    texts.require_kind("text")
    pairs_path = storage.join(texts.path, CAPTION_PAIRS)
    if not storage.exists(storage.join(pairs_path, "zarr.json")):
        what = f"{texts.path} does not say whose captions its sentences are: it has no {CAPTION_PAIRS}/"
        remedy = "run cache-images with --captions, whose --captions-out this is; again, if it was stopped"
        raise StoreError(what, remedy=remedy)
    texts.require_complete()
    require_embeddings(texts)
    require_same_teacher(images, texts)
    pairs = Pairs(pairs_path, cached=True)
    require_pairs_match(pairs, images, texts)
    return Captions(texts, pairs)


def captions_out(images_out: str) -> str:
    """Where the captions of an image store go unless another place is given: beside it."""
    return f"{images_out.rstrip('/').removesuffix('.zarr')}.captions.zarr"
