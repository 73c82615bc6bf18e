"""Embeddings of class names and captions, kept in files that are named after the text tower and the texts: models with
the same text tower share them.

Shapes: M texts, L tokens, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch.nn import functional as F

from cache_schemas import digest_of
from dimefm.models.clip import Clip, token_counts
from dimefm.system import storage
from dimefm.system.progress import Progress

_BATCH = 256  # sentences that go through the text tower at a time
_BLOCK = 8192  # sentences that are sorted by length together


class TextEmbeddings:
    """Unit-norm embeddings by one model's text tower, kept in files of one folder."""

    def __init__(self, clip: Clip, folder: str) -> None:
        self._clip, self._folder = clip, folder
        self._tower = clip.text_digest()

    def of_classes(self, names: Sequence[str], prompts: list[list[str]]) -> torch.Tensor:
        """float32 (C, D): the mean over the prompts of each class, normalised again. Kept by tower, names and
        prompts."""
        key = {"tower": self._tower, "classes": list(names), "prompts": prompts}
        return self._kept(key, lambda: self._mean_of(prompts))

    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 (M, D): one embedding per text. Kept by tower and texts."""
        key = {"tower": self._tower, "texts": list(texts)}
        return self._kept(key, lambda: torch.cat(list(self._embedded(list(texts)))))

    def _mean_of(self, prompts: list[list[str]]) -> torch.Tensor:
        """Classes with the same prompts (ImageNet has two pairs of one name) get exactly the same embedding: which of
        them is predicted must not depend on rounding."""
        distinct = {one: place for place, one in enumerate(dict.fromkeys(map(tuple, prompts)))}
        flat = [text for texts in distinct for text in texts]
        classes = torch.repeat_interleave(torch.arange(len(distinct)), torch.tensor([len(texts) for texts in distinct]))
        sums_CD = torch.zeros(len(distinct), self._clip.identity.embed_dim, dtype=torch.float64)
        start = 0
        for block_MD in self._embedded(flat):
            sums_CD.index_add_(0, classes[start : start + len(block_MD)], block_MD.double())
            start += len(block_MD)
        return F.normalize(sums_CD, dim=-1).float()[[distinct[tuple(texts)] for texts in prompts]]

    def _embedded(self, texts: list[str]) -> Iterator[torch.Tensor]:
        """float32 (M, D) for each block of texts in turn. Within a block, texts of similar length share a batch."""
        with Progress("encoding", len(texts), "text") as progress:
            for start in range(0, len(texts), _BLOCK):
                tokens_ML = self._clip.tokenize(texts[start : start + _BLOCK])
                order = torch.from_numpy(np.argsort(token_counts(tokens_ML), kind="stable"))
                found = [self._clip.encode_tokens(tokens_ML[places]) for places in order.split(_BATCH)]
                sorted_MD = torch.cat(found).cpu()  # waits for a GPU once per block
                yield torch.empty_like(sorted_MD).index_copy_(0, order, sorted_MD)
                progress.at(min(start + _BLOCK, len(texts)))

    def _kept(self, key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        digest = digest_of(key)
        path = storage.join(self._folder, f"{digest}.safetensors")
        try:
            if storage.exists(path):
                return torch.from_numpy(load(storage.read_bytes(path))["embedding"])
        except (SafetensorError, KeyError):
            pass  # the file is cut short or overwritten: it is made again
        embedding = make()
        with storage.writing_to(path):
            storage.write_atomic(path, save({"embedding": embedding.numpy()}))
        return embedding
