"""A probe whose settings a few validation images choose: a search of 10 epochs, as ELEVATER has it, against 50."""

import tempfile
from itertools import product
from pathlib import Path

import click
import numpy as np

from benchmarks.measure import machine, table
from benchmarks.probe_search import training_and_test_parts
from dimefm.datasets.own_sets import open_folder
from dimefm.evaluation.features import compute_features
from dimefm.evaluation.open_model import open_model
from dimefm.evaluation.probe import FINAL_EPOCHS, SEARCH_EPOCHS, few_shot_rows, probe, validation_part
from dimefm.evaluation.text_embeddings import TextEmbeddings


@click.command()
@click.option("--model", required=True, help="A run, a folder, or local-dir:FOLDER.")
@click.option("--set", "folder", required=True, help="A labelled set: every fifth image of a class is a test image.")
@click.option("--shots", default="2,3,5,10", show_default=True, help="Training images per class.")
@click.option("--seeds", default=8, show_default=True, help="Draws of them.")
def probe_few(model: str, folder: str, shots: str, seeds: int) -> None:
    """Top-1 of linear probes whose settings a few validation images chose."""
    searches = (SEARCH_EPOCHS, FINAL_EPOCHS)
    with tempfile.TemporaryDirectory() as temporary, open_model(model) as clip:
        images = open_folder(folder)
        train, test = training_and_test_parts(images)
        heads_CD = TextEmbeddings(clip, temporary).of_classes(train.classnames, train.prompts())
        features = [compute_features(clip, part, f"{temporary}/{part.split}.zarr") for part in (train, test)]
        labels, rows = train.class_labels, []
        for number in map(int, shots.split(",")):
            top1: dict[int, list[float]] = {epochs: [] for epochs in searches}
            for seed, epochs in product(range(seeds), searches):
                chosen = few_shot_rows(labels, number, seed)
                result = probe(
                    features[0], labels, chosen, features[1], test, "accuracy", heads_CD=heads_CD, epochs=epochs
                )
                top1[epochs].append(float((result.scores_NC.argmax(1) == test.class_labels).mean()))
            held = int(validation_part(labels[chosen]).sum())
            shown = [f"{100 * np.mean(top1[e]):.1f} ({100 * min(top1[e]):.1f})" for e in searches]
            rows.append((str(number), f"{len(chosen):,}", f"{held:,}", *shown))
    head = ("shots", "training images", "of which validate", *(f"{epochs} epochs" for epochs in searches))
    click.echo(table(head, rows))
    click.echo(f"{machine()}; {Path(folder).name}, {len(images.classnames)} classes; mean top-1 of {seeds} (the worst)")
