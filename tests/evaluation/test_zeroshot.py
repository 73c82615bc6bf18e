"""Zero-shot: validation's top-1 against numpy, and evaluation against open_clip's own preprocessing and towers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.special import log_softmax

from cache_schemas.embedding_store import CpuDecoder
from cache_schemas.evaluation import EvaluationResult
from dimefm.cli import cli
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.own_sets import open_folder
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.evaluation.predictions import read_predictions, read_scores
from dimefm.evaluation.results import read_results
from dimefm.evaluation.scoring import measure
from dimefm.images.decode import decode_rgb
from dimefm.images.preprocess import resize
from dimefm.training.validation import class_embeddings, count_correct
from tests.making import make_jpeg, read_tar, write_tar

CLASSES, IMAGES, WIDTH = 9, 40, 12
BROKEN = (7, 8, 39)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CLASSES, IMAGES)


@pytest.fixture
def images(tmp_path: Path, labels: np.ndarray) -> ImageSet:
    """40 images in 9 classes, three of them broken."""
    (tmp_path / "classnames.txt").write_text("".join(f"class {c}\n" for c in range(CLASSES)))
    (tmp_path / "templates.txt").write_text("a {c}\n")
    members: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        data = b"broken" if i in BROKEN else make_jpeg(seed=i)
        members |= {f"{i}.jpg": data, f"{i}.cls": str(label).encode()}
    write_tar(tmp_path / "a.tar", members)
    return open_folder(str(tmp_path))


def contents(images: ImageSet) -> list[bytes]:
    return [Path(s.file).read_bytes()[s.offset : s.offset + s.size] for s in images.samples]


# -- validation while training ----------------------------------------------------------------------------------------


def embed(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """A stand-in for a model: some fixed, scattered function of the pixels of each image."""
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((3 * 8 * 8, WIDTH)))
    pixels = pixels_B3HW.double().flatten(1)
    return torch.nn.functional.normalize((pixels - pixels.mean(dim=1, keepdim=True)) @ weights, dim=-1).float()


def preprocess(data: bytes) -> torch.Tensor:
    return resize(decode_rgb(data), (8, 8))


def answers(classes_CD: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda pixels_B3HW: (embed(pixels_B3HW) @ torch.from_numpy(classes_CD).T).argmax(dim=1)


def by_numpy(images: ImageSet, classes_CD: np.ndarray, labels: np.ndarray) -> float:
    """top-1, image by image."""
    correct = 0
    for data, label in zip(contents(images), labels, strict=True):
        if data != b"broken":
            scores = classes_CD @ embed(preprocess(data)[None])[0].numpy()
            correct += max(range(CLASSES), key=scores.__getitem__) == label
    return correct / len(labels)


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_top1_agrees_with_numpy_and_broken_images_are_wrong(
    images: ImageSet, labels: np.ndarray, batch_size: int
) -> None:
    classes_CD = unit(np.random.default_rng(2).standard_normal((CLASSES, WIDTH))).astype(np.float32)
    other_CD = np.roll(classes_CD, 1, axis=0)
    found, readable = count_correct(images, [answers(classes_CD), answers(other_CD)], preprocess, batch_size)
    assert [right / len(labels) for right in found] == [
        pytest.approx(by_numpy(images, one_CD, labels)) for one_CD in (classes_CD, other_CD)
    ]
    assert 0 < found[0] < readable == len(labels) - len(BROKEN)


def test_a_perfect_model_is_right_on_all_but_the_broken(images: ImageSet, labels: np.ndarray) -> None:
    readable = iter(np.delete(labels, BROKEN))
    found = count_correct(images, [lambda pixels: torch.tensor([next(readable) for _ in pixels])], preprocess, 5)
    assert found == ([37], 37)


def test_class_embeddings_are_the_normalised_mean_of_unit_prompts() -> None:
    rng = np.random.default_rng(3)
    vectors = {f"{c}-{t}": unit(rng.standard_normal(WIDTH)) for c in range(4) for t in range(3)}
    prompts = [[f"{c}-{t}" for t in range(3)] for c in range(4)]
    expected = unit(np.stack([np.mean([vectors[text] for text in texts], axis=0) for texts in prompts]))
    found = class_embeddings(prompts, lambda texts: torch.from_numpy(np.stack([vectors[text] for text in texts])))
    assert np.abs(found.numpy() - expected).max() < 1e-6


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve classes of the sample's caltech101, whose images are of all sizes, as one of the user's own."""
    source, folder = sample / "eval" / "caltech101", tmp_path_factory.mktemp("eval") / "small"
    members = read_tar(next(source.glob("*.tar")), 1000)
    kept = {name.removesuffix(".cls") for name, data in members.items() if name.endswith(".cls") and int(data) < 12}
    write_tar(folder / "a.tar", {name: data for name, data in members.items() if name.rpartition(".")[0] in kept})
    for name, lines in (("classnames.txt", 12), ("templates.txt", 3)):
        text = (source / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(text[:lines]), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def reference(small: str, sample_teacher: str) -> np.ndarray:
    """Cosines (N, C) by open_clip alone: its image transform, its towers, its classifier of prompts."""
    torch.set_num_threads(1)
    model, _, transform = open_clip.create_model_and_transforms(sample_teacher)
    model.eval()
    images = open_folder(small)
    templates = [lambda name, t=template: t.replace("{c}", name) for template in images.templates]
    with torch.inference_mode():
        classifier_DC = open_clip.build_zero_shot_classifier(
            model, open_clip.get_tokenizer(sample_teacher), list(images.classnames), templates
        )
        pixels = [transform(Image.open(io.BytesIO(data))) for data in contents(images)]
        features_ND = torch.cat([model.encode_image(one[None], normalize=True) for one in pixels])
    return (features_ND @ classifier_DC).numpy()


def evaluated(sample_teacher: str, folder: str, out: Path, decoder: CpuDecoder = "pillow") -> EvaluationResult:
    config = EvaluationConfig(
        model=sample_teacher, folders=(folder,), out=str(out), name="m", device="cpu", predictions=True, decoder=decoder
    )
    (result,) = evaluate(config).results
    return result


def off(out: Path, reference: np.ndarray) -> float:
    """How far the logits that were kept are from open_clip's, at most; but for a constant of each image."""
    scores_NC = read_scores(f"{out}/m/predictions/own-small.zero-shot.parquet")
    return float(np.abs(np.log(scores_NC) - log_softmax(100 * reference, axis=1)).max())


def test_the_suite_finds_just_what_open_clip_does(
    small: str, sample_teacher: str, reference: np.ndarray, tmp_path: Path
) -> None:
    found = evaluated(sample_teacher, small, tmp_path)
    labels = open_folder(small).class_labels
    order_NC = np.argsort(-reference, axis=1)
    correct = order_NC[:, 0] == labels
    assert read_predictions(str(tmp_path / "m"), found) == order_NC[:, 0].tolist()
    assert off(tmp_path, reference) < 1e-4, "100 times a rounding error of the cosine"
    assert found.metrics["top1"] == found.value == correct.mean()
    assert found.metrics["top5"] == (order_NC[:, :5] == labels[:, None]).any(axis=1).mean()
    assert found.metrics["mean_per_class"] == pytest.approx(
        np.mean([correct[labels == c].mean() for c in np.unique(labels)])
    )
    assert 0.2 < found.metrics["top1"] < found.metrics["top5"] < 1
    low, high = found.interval
    assert low < found.value < high
    assert (found.set, found.suite, found.protocol, found.metric) == ("small", "own", "zero-shot", "top1")
    assert (found.images, found.classes, found.unreadable, found.expected) == (60, 12, 0, None)
    assert read_results(str(tmp_path / "m")) == [found]


def test_the_fast_decoder_says_so_and_is_nearly_the_same(
    small: str, sample_teacher: str, reference: np.ndarray, tmp_path: Path
) -> None:
    found = evaluated(sample_teacher, small, tmp_path, "fast")
    assert found.settings["decoder"] == "fast"
    same = np.array(read_predictions(str(tmp_path / "m"), found)) == reference.argmax(axis=1)
    assert same.mean() > 0.95
    assert off(tmp_path, reference) < 0.01


def test_broken_images_are_wrong_and_named(images: ImageSet, teacher_name: str, tmp_path: Path) -> None:
    found = evaluated(teacher_name, images.where, tmp_path / "out")
    predictions = read_predictions(str(tmp_path / "out" / "m"), found)
    assert [place for place, label in enumerate(predictions) if label == -1] == list(BROKEN)
    assert found.value == np.mean(np.array(predictions) == images.class_labels)
    assert (found.images, found.unreadable) == (IMAGES, len(BROKEN))
    assert found.notes[-1].startswith("3 images could not be read and count as wrong: 7 (")


def test_five_classes_have_no_top5_which_would_be_certain(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "templates.txt").write_text("{c}\n")
    write_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg(), "0.cls": b"2"})
    found = measure(np.array([[1, 0, 0, 0, 0]], np.float32), open_folder(str(tmp_path)), "accuracy")
    assert found.values == {"top1": 0, "mean_per_class": 0}


def test_the_command_prints_a_line_a_set_and_where_it_wrote_all(
    small: str, images: ImageSet, teacher_name: str, tmp_path: Path
) -> None:
    words = ["evaluate", teacher_name, small, images.where, "--out", str(tmp_path / "out"), "--name", "m"]
    done = CliRunner().invoke(cli, [*words, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    first, second = read_results(str(tmp_path / "out" / "m"))
    lines = done.stdout.splitlines()
    low, high = first.interval
    assert lines[0] == f"own-small          zero-shot    top-1 {first.value:6.1%} [{low:.1%}, {high:.1%}]"
    mean = first.metrics["mean_per_class"]
    others = f"top-5 {first.metrics['top5']:.1%}; mean of the classes {mean:.1%}"
    assert lines[1] == f"    {others}; 60 images, 12 classes"
    assert f"{second.value:6.1%} [" in lines[2]
    assert lines[3].endswith("40 images, 9 classes")
    assert "3 images could not be read and count as wrong: 7 (" in " ".join(done.stdout.split())
    assert lines[-2] == "[low, high] is the 95% interval"
    assert lines[-1:] == [f"written: {tmp_path}/out/m/results.jsonl"]
