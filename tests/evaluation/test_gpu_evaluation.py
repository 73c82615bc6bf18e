"""Evaluation and selection on a GPU give what they give on the CPU, but for rounding; twice the same on one GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.evaluation.features import Features
from dimefm.evaluation.linear_heads import FeatureRows, train_heads
from dimefm.evaluation.text_embeddings import TextEmbeddings
from dimefm.models.clip import load_clip
from dimefm.selection.clusters import cluster
from dimefm.selection.grounding import Grounding
from dimefm.selection.repetitions import repetitions
from tests.stores import random_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cpu", "cuda", "cuda")


def assert_alike(found: list[torch.Tensor], **tolerance: float) -> None:
    """Of the CPU and twice of the GPU."""
    cpu, gpu, again = found
    torch.testing.assert_close(gpu, cpu, **tolerance)
    assert torch.equal(gpu, again)


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_a_probe_is_that_of_the_cpu(tmp_path: Path, limit: int) -> None:
    store, _ = random_store(tmp_path / "f.zarr", rows=1000, shard_rows=256, embed_dim=64)
    targets = torch.from_numpy(np.random.default_rng(0).integers(0, 5, 1000))
    start_CD = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found, logits = [], []
    for device in DEVICES:
        data = FeatureRows(Features(store), np.arange(1000), device, limit)
        *_, heads = train_heads(data, targets, start_CD.to(device), [0.1, 0.001], [1e-3, 0.1], 3)
        found.append(heads.weight.cpu())
        logits.append(torch.cat([heads.logits(block_BD).cpu() for block_BD in data.blocks()]))
    assert_alike(found, rtol=1e-4, atol=1e-5)
    assert_alike(logits, rtol=1e-3, atol=1e-4)


def test_scores_and_clusters_of_sentences_are_those_of_the_cpu(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = np.eye(16)[np.arange(2000) % 16] + 0.1 * rng.standard_normal((2000, 16))
    texts, halves = random_store(tmp_path / "t.zarr", rows=2000, shard_rows=1024, kind="text", values=values)
    images, _ = random_store(tmp_path / "i.zarr", rows=500, shard_rows=512)
    scores, labels, repeats = [], [], []
    for place, device in enumerate(DEVICES):
        folder = str(tmp_path / f"clusters-{place}")
        scores.append(torch.from_numpy(Grounding.sample(images, texts, 400, seed=0, device=device).scores(halves)))
        label_C = cluster(texts, np.arange(2000), folder, seed=0, device=device, copies=True)
        labels.append(label_C)
        repeats.append(repetitions(texts, np.arange(2000), label_C, folder, 0.99, device=device))
    assert_alike(scores, rtol=1e-3, atol=1e-3)
    assert (labels[0] == labels[1]).mean() > 0.99
    assert (labels[1] == labels[2]).all()
    assert (repeats[1] == repeats[2]).all()


def test_texts_are_embedded_as_on_the_cpu(teacher_name: str, tmp_path: Path) -> None:
    texts = [f"a photo of {'a very ' * (number % 7)}large number {number}" for number in range(600)]
    found = []
    for place, device in enumerate(DEVICES):
        clip = load_clip(teacher_name, precision="fp32", device=device)
        found.append(TextEmbeddings(clip, str(tmp_path / str(place))).of_texts(texts))
    assert_alike(found, rtol=0, atol=1e-4)


def test_an_evaluation_gives_the_numbers_of_the_cpu(teacher_name: str, cifar10: str, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for device in ("cpu", "cuda"):
        config = EvaluationConfig(model=teacher_name, folders=(cifar10,), out=str(tmp_path / device), device=device)
        (result,) = evaluate(config).results
        assert result.device == device
        found.append(result.metrics)
    assert found[1] == pytest.approx(found[0], abs=0.03), "of 200 images some are on the edge"
