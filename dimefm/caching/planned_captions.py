"""The captions in the plan of an image store, as a source of sentences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cache_schemas.embedding_store import rows_path
from cache_schemas.plan import CAPTIONS, SourceFile
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.sources.files import stat_files
from dimefm.store.embedding_store import Store
from dimefm.system import storage


class PlannedCaptions:
    """The captions of the images of a store, image by image. The key of a caption is that of its image, and in an image
    with several :N follows, counted from 0."""

    def __init__(self, images: Store) -> None:
        self._images = images
        self.name = f"captions of {images.path}"

    def files(self) -> list[SourceFile]:
        """The plans of the store."""
        shards = range(self._images.schema.shards)
        return stat_files([storage.join(self._images.path, rows_path(shard)) for shard in shards])

    def samples(self, account: Account) -> Iterator[TextSample]:
        """Every caption. Nothing is left out: what could not be used was counted when the images were planned."""
        schema = self._images.schema
        for shard in range(schema.shards):
            entries = self._images.entries(np.arange(*schema.shard_range(shard)), ("key", CAPTIONS))
            for key, captions in zip(entries["key"].to_pylist(), entries[CAPTIONS].to_pylist(), strict=True):
                for number, text in enumerate(captions):
                    yield TextSample(f"{key}:{number}" if len(captions) > 1 else key, text)
