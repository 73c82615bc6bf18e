"""Train the teacher's text tower to imitate CLIP's own, on real CLIP embeddings of a few thousand names.

A batch has two kinds of sentences: names in a random prompt template, with the CLIP embedding of the name as target;
and captions, with the mean of the embeddings of the names that occur in the caption as target.

Shapes: B sentences in a batch, L tokens in a sentence, N names, D = 512 embedding width, P prototypes of images.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch.nn import functional as F

TEMPLATES: list[Callable[[str], str]] = [
    *OPENAI_IMAGENET_TEMPLATES,
    lambda name: name,
    lambda name: f"a {name}",
    lambda name: f"the {name}",
]
LONGEST_NAME = 5
"""The number of words in the longest name that is looked for in a caption."""


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    """How the text tower is trained."""

    steps: int = 3000
    names_per_step: int = 96
    captions_per_step: int = 32
    learning_rate: float = 5e-3
    warmup_steps: int = 100
    score_weight: float = 300.0
    log_every: int = 250
    seed: int = 0


@dataclass(frozen=True)
class Names:
    """Names and their CLIP text embeddings, float32 (N, D) of unit norm."""

    names: list[str]
    embeddings_ND: torch.Tensor


@dataclass(frozen=True)
class Captions:
    """Captions and the rows of the names found in each, at least one."""

    captions: list[str]
    found: list[list[int]]


def find_names(names: Sequence[str], captions: Sequence[str]) -> Captions:
    """The captions in which a name occurs. Longer names win; a plural in -s or -es counts as its singular."""
    row_of: dict[str, int] = {}
    for row, name in enumerate(names):
        row_of.setdefault(" ".join(_words(name)), row)
    pairs = [(caption, _names_in(_words(caption), row_of)) for caption in captions]
    kept = [(caption, rows) for caption, rows in pairs if rows]
    return Captions([caption for caption, _ in kept], [rows for _, rows in kept])


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _names_in(words: list[str], row_of: dict[str, int]) -> list[int]:
    rows: list[int] = []
    start = 0
    while start < len(words):
        for length in range(min(LONGEST_NAME, len(words) - start), 0, -1):
            row = _row(" ".join(words[start : start + length]), row_of)
            if row is not None:
                rows.append(row)
                start += length
                break
        else:
            start += 1
    return rows


def _row(phrase: str, row_of: dict[str, int]) -> int | None:
    for form in (phrase, phrase.removesuffix("s"), phrase.removesuffix("es")):
        if form in row_of:
            return row_of[form]
    return None


def train_text_tower(
    model: Any,
    tokenize: Callable[[list[str]], torch.Tensor],
    names: Names,
    captions: Captions,
    prototypes_PD: torch.Tensor,
    config: TextTraining,
    report: Callable[[str], None],
) -> None:
    """Train the text side of an open_clip model in place; its image side is not touched.

    `prototypes_PD` are typical image embeddings, of unit norm: a text embedding has to score them as its target does.
    """
    optimizers = _optimizers(model, config)
    chance = random.Random(config.seed)
    model.train()
    for step in range(1, config.steps + 1):
        sentences, targets_BD = draw_batch(chance, names, captions, config)
        embeddings_BD = encode_cropped(model, tokenize(sentences))
        loss = text_loss(embeddings_BD, targets_BD, prototypes_PD, config.score_weight)
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _warmup_cosine(step, config)
            optimizer.step()
            optimizer.zero_grad()
        if step % config.log_every == 0:
            cosine = (embeddings_BD * targets_BD).sum(1).mean().item()
            report(f"step {step:,} of {config.steps:,}: loss {loss.item():.4f}, cosine {cosine:.3f}")
    model.eval()


def encode_cropped(model: Any, tokens_BL: torch.Tensor) -> torch.Tensor:
    """The embeddings that model.encode_text gives, of unit norm (B, D), computed without the padding that all sentences
    of the batch share. Attention is causal: what follows a sentence's last token never matters, and most of it is
    padding."""
    length = int((tokens_BL != 0).sum(1).max())
    tokens_BL = tokens_BL[:, :length]
    x = model.token_embedding(tokens_BL) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    last_B = tokens_BL.argmax(1)  # the end-of-text token has the highest number
    return F.normalize(x[torch.arange(len(x)), last_B] @ model.text_projection, dim=1)


def _optimizers(model: Any, config: TextTraining) -> list[torch.optim.Optimizer]:
    """One for the table of tokens, which updates only the rows in use (three times faster), and one for the rest."""
    table = model.token_embedding
    table.sparse = True
    parts = (model.transformer, model.ln_final)
    rest = [model.positional_embedding, model.text_projection, *(p for m in parts for p in m.parameters())]
    betas = (0.9, 0.98)
    return [
        torch.optim.SparseAdam([table.weight], lr=config.learning_rate, betas=betas),
        torch.optim.AdamW(rest, lr=config.learning_rate, betas=betas, weight_decay=0.0),
    ]


def draw_batch(
    chance: random.Random, names: Names, captions: Captions, config: TextTraining
) -> tuple[list[str], torch.Tensor]:
    """The sentences of a step, and their targets, float32 (B, D) of unit norm."""
    rows = [chance.randrange(len(names.names)) for _ in range(config.names_per_step)]
    picks = [chance.randrange(len(captions.captions)) for _ in range(config.captions_per_step)]
    sentences = [chance.choice(TEMPLATES)(names.names[row]) for row in rows]
    means = [names.embeddings_ND[captions.found[pick]].mean(0) for pick in picks]
    targets_BD = torch.cat([names.embeddings_ND[rows], F.normalize(torch.stack(means), dim=1)])
    return sentences + [captions.captions[pick] for pick in picks], targets_BD


def text_loss(
    embeddings_BD: torch.Tensor, targets_BD: torch.Tensor, prototypes_PD: torch.Tensor, score_weight: float
) -> torch.Tensor:
    """1 - cosine to the target, plus the squared error of the cosines with the image prototypes.

    CLIP's text embeddings share a large common part, so that even with a cosine of 0.95 images may be ranked badly. The
    second term weighs the directions in which images differ.
    """
    closeness = 1 - (embeddings_BD * targets_BD).sum(1).mean()
    score_error = ((embeddings_BD - targets_BD) @ prototypes_PD.T).square().mean()
    return closeness + score_weight * score_error


def _warmup_cosine(step: int, config: TextTraining) -> float:
    """The factor on the learning rate at a step, counted from 1."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
