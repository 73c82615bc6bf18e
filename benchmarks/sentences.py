"""Sentences a second of stage 1's text batches against the plain loop: batches as they come, every one padded to the
context length."""

import gzip
from pathlib import Path

import click
import numpy as np
import open_clip
import torch
from torch.nn.functional import normalize

from benchmarks.measure import machine, median, ratio, rounds, table
from cache_schemas import EmbeddingStore, SourceSummary
from cache_schemas.plan import PlannedText
from dimefm.caching.encode_rows import encode_rows
from dimefm.models.clip import Clip, load_clip, wrap
from dimefm.sample import sample_dir


@click.command()
@click.option("--texts", help="A .txt.gz file of sentences. Default: one of the sample's.")
@click.option("--limit", default=4096, show_default=True, help="Sentences, spread over the file.")
@click.option("--deep", default=256, show_default=True, help="Of them, for the tower of ViT-B-32.")
@click.option("--count", default=5, show_default=True, help="Rounds.")
def sentences(texts: str | None, limit: int, deep: int, count: int) -> None:
    """Sentences/s, by length against padded, for the sample's teacher and for ViT-B-32's text tower."""
    torch.set_num_threads(1)
    path = Path(texts) if texts else sorted((sample_dir() / "texts").iterdir())[0]
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines = [lines[i] for i in np.linspace(0, len(lines) - 1, min(limit, len(lines))).astype(int)]
    rows = []
    for name, clip, chosen in (
        ("sample teacher", load_clip(f"local-dir:{sample_dir() / 'teacher'}", device="cpu"), lines),
        ("ViT-B-32, random weights", _random("ViT-B-32"), lines[:: max(1, len(lines) // deep)][:deep]),
    ):
        entries = [PlannedText(row, str(row), line) for row, line in enumerate(chosen)]
        schema = _schema(clip, len(chosen))
        ours = encode_rows(entries, schema, clip).arrays["embedding"]
        theirs = _plain(clip, chosen)
        ours = ours.astype(np.float32) / np.linalg.norm(ours.astype(np.float32), axis=1, keepdims=True)
        cosine = float((ours * theirs).sum(axis=1).min())
        seconds = rounds(
            {
                "ours": lambda e=entries, s=schema, c=clip: encode_rows(e, s, c),
                "plain": lambda c=clip, t=chosen: _plain(c, t),
                "tokenizer": lambda c=clip, t=chosen: c.tokenize(t),
            },
            count,
        )
        rate = {key: f"{len(chosen) / median(values):,.0f}" for key, values in seconds.items()}
        times = f"{ratio(seconds['plain'], seconds['ours']):.2f}"
        context = str(clip.identity.context_length)
        rows.append((name, context, rate["plain"], rate["ours"], times, rate["tokenizer"], f"{cosine:.6f}"))
    head = ("text tower", "context", "padded/s", "by length/s", "ratio", "tokenizer alone/s", "least cosine")
    click.echo(table(head, rows))
    click.echo(f"one core of: {machine()}; {path.name}, {len(lines):,} sentences, medians of {count} paired rounds")


def _plain(clip: Clip, texts: list[str]) -> np.ndarray:
    found = []
    with torch.inference_mode():
        for at in range(0, len(texts), 32):
            features = clip.model.encode_text(clip.tokenizer(texts[at : at + 32]))
            found.append(normalize(features, dim=-1))
    return torch.cat(found).numpy()


def _random(name: str) -> Clip:
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    return wrap(model, name, None, open_clip.get_model_config(name), precision="fp32", device="cpu")


def _schema(clip: Clip, rows: int) -> EmbeddingStore:
    source = SourceSummary(arguments=(), files=0, bytes=0, digest="", repeated_keys=0, problems=())
    return EmbeddingStore(
        kind="text",
        rows=rows,
        dim=clip.identity.embed_dim,
        chunk_rows=1,
        shard_rows=rows,
        batch_size=32,
        teacher=clip.identity,
        source=source,
    )
