"""Stage 1 over sentences: end to end, and what of it is the tokenizer and what the tower."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.encoding import entries
from benchmarks.gpu.kit import Kit
from benchmarks.gpu.timing import seconds
from dimefm.caching.encode_rows import encode_rows
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.models.clip import teacher_precision, token_counts


def sentences(kit: Kit) -> None:
    """Sentences/s of one process from text to stored embedding; of the tokenizer alone; of the text tower alone, in
    batches of like length as stage 1 makes them."""
    clip, batch = kit.inputs.teacher(teacher_precision(kit.device.type), kit.device), kit.sizes.batch
    request = PlanRequest(kind="text", arguments=(str(kit.inputs.text_file()),), batch_size=batch)
    store = open_or_plan(request, str(kit.inputs.folder / "stage1-texts.zarr"), clip.identity)
    rows = entries(store)
    texts = [row.text for row in rows]
    tokens_NL = clip.tokenize(texts)
    counts_N = torch.from_numpy(token_counts(tokens_NL))
    batches = tokens_NL[counts_N.argsort(stable=True)].split(batch)

    def tower() -> None:
        for tokens_BL in batches:
            clip.encode_tokens(tokens_BL)

    ways: dict[str, Callable[[], object]] = {
        "sentences, end to end": lambda: encode_rows(rows, store.schema, clip),
        "tokenizer alone": lambda: clip.tokenize(texts),
        "text tower alone": tower,
    }
    mean = float(counts_N.double().mean())
    at = f"{kit.sizes.name}, {clip.identity.precision}, batch {batch}, one process, "
    at += f"{len(rows):,} sentences of {mean:.1f} tokens"
    rates = {name: len(rows) / seconds([way], kit.device, repeats=2) for name, way in ways.items()}
    for name, rate in rates.items():
        kit.line(name, rate, "sentences/s", at)
    kit.rate("teacher_texts_per_second", rates["sentences, end to end"])
