"""Why a student fails on images unlike those of its training: what it answers there, whether batch norm's statistics
are to blame, and whether all its embeddings have moved together.

Shapes: N images, C classes, D embedding width.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.changed_sets import CHANGES, changed_set
from benchmarks.measure import table
from benchmarks.recipes import SETS
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.own_sets import open_folder
from dimefm.evaluation.features import compute_features
from dimefm.evaluation.open_model import open_model
from dimefm.evaluation.text_embeddings import TextEmbeddings
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.training.mean_embedding import mean_embedding

_Array = np.ndarray[Any, Any]


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--images", required=True, help="Image store, for the teacher's mean embedding.")
@click.option("--data", required=True, type=click.Path(exists=True), help=f"Folder of the sets {', '.join(SETS)}.")
@click.option("--out", default="runs/recipes", show_default=True, help="Folder of recipes, for the changed sets.")
def shift(models: tuple[str, ...], images: str, data: str, out: str) -> None:
    """Students on changed images: top-1 as they are, with batch norm's statistics of these images, and with the mean of
    all embeddings moved to the teacher's; and how often the most frequent answer is given."""
    mean_D, rows = mean_embedding(Store(images)).numpy(), list[tuple[str, ...]]()
    for model in models:
        with open_model(model, device="cpu") as clip, tempfile.TemporaryDirectory() as folder:
            texts = TextEmbeddings(clip, str(Path(out) / "evaluations" / "text_embeddings"))
            for change in ("", *CHANGES):
                found = []
                for name in SETS:
                    plain = Path(data, name)
                    opened = open_folder(str(changed_set(plain, change, Path(out) / "changed") if change else plain))
                    classes_CD = texts.of_classes(opened.classnames, opened.prompts()).numpy()
                    found.append(_look(clip, opened, classes_CD, mean_D, f"{folder}/{name}-{change}"))
                rows.append((Path(model).name, change or "none", *(f"{100 * v:.1f}" for v in np.mean(found, axis=0))))
    head = ("model", "change", "top-1", "batch norm of these", "mean moved", "share of the first answer", "cosine")
    click.echo(table(head, rows))
    click.echo(f"means of {', '.join(SETS)}; cosine: of the mean embedding to the teacher's mean over its images")


def _look(clip: Clip, images: ImageSet, classes_CD: _Array, mean_D: _Array, path: str) -> tuple[float, ...]:
    labels_N = np.asarray(images.labels)
    student_ND = compute_features(clip, images, path, decoder="fast", threads=1).all()
    own_D = student_ND.mean(axis=0)
    answers_N = (student_ND @ classes_CD.T).argmax(axis=1)
    moved_N = ((student_ND - own_D + mean_D) @ classes_CD.T).argmax(axis=1)
    adapted_N = answers_N
    if norms := [one for one in clip.model.visual.modules() if isinstance(one, torch.nn.modules.batchnorm._BatchNorm)]:
        kept = [{name: value.clone() for name, value in one.state_dict().items()} for one in norms]
        for one in norms:
            one.reset_running_stats()
            one.momentum = None  # the mean over all batches
            one.train()
        compute_features(clip, images, f"{path}-seen", decoder="fast", threads=1)
        for one in norms:
            one.eval()
        adapted_ND = compute_features(clip, images, f"{path}-adapted", decoder="fast", threads=1).all()
        adapted_N = (adapted_ND @ classes_CD.T).argmax(axis=1)
        for one, state in zip(norms, kept, strict=True):
            one.load_state_dict(state)
    hits = [float((found_N == labels_N).mean()) for found_N in (answers_N, adapted_N, moved_N)]
    first = np.bincount(answers_N).max() / len(answers_N)
    cosine = own_D @ mean_D / np.linalg.norm(own_D) / np.linalg.norm(mean_D)
    return (*hits, float(first), float(cosine))
