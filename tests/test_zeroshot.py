"""Zero-shot accuracy against another implementation, in numpy and float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dimefm.clip import Clip
from dimefm.decode import decode_rgb
from dimefm.evaluate import evaluate
from dimefm.labelled import LabelledSet
from dimefm.preprocess import Preprocess, resize
from dimefm.zeroshot import class_embeddings, zero_shot
from tests.making import make_jpeg, read_tar, write_tar

CLASSES, IMAGES, WIDTH = 9, 40, 12


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CLASSES, IMAGES)


@pytest.fixture
def labelled(tmp_path: Path, labels: np.ndarray) -> LabelledSet:
    """40 images in 9 classes, of which 7, 8 and 39 are broken."""
    (tmp_path / "classnames.txt").write_text("".join(f"class {c}\n" for c in range(CLASSES)))
    (tmp_path / "templates.txt").write_text("a {c}\n")
    members: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        broken = i in (7, 8, 39)
        members |= {f"{i}.jpg": b"broken" if broken else make_jpeg(seed=i), f"{i}.cls": str(label).encode()}
    write_tar(tmp_path / "a.tar", members)
    return LabelledSet(str(tmp_path))


def embed(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """A stand-in for a model: some fixed, scattered function of the pixels of each image."""
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((3 * 8 * 8, WIDTH)))
    pixels = pixels_B3HW.double().flatten(1)
    return torch.nn.functional.normalize((pixels - pixels.mean(dim=1, keepdim=True)) @ weights, dim=-1).float()


def preprocess(data: bytes) -> torch.Tensor:
    return resize(decode_rgb(data), (8, 8))


def by_numpy(labelled: LabelledSet, classes_CD: np.ndarray, labels: np.ndarray) -> tuple[float, float, list[int]]:
    """top-1, top-5 and predictions, image by image."""
    top1, top5, predictions = 0, 0, []
    for item, label in zip(labelled.items, labels, strict=True):
        data = Path(item.file).read_bytes()[item.offset : item.offset + item.size]
        if data == b"broken":
            predictions.append(-1)
            continue
        scores = classes_CD @ embed(preprocess(data)[None])[0].numpy()
        order = sorted(range(len(scores)), key=lambda c: -scores[c])
        predictions.append(order[0])
        top1 += order[0] == label
        top5 += label in order[:5]
    return top1 / len(labels), top5 / len(labels), predictions


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_top1_and_top5_agree_with_numpy_and_broken_images_are_wrong(
    labelled: LabelledSet, labels: np.ndarray, batch_size: int
) -> None:
    classes_CD = unit(np.random.default_rng(2).standard_normal((CLASSES, WIDTH))).astype(np.float32)
    found = zero_shot(labelled, torch.from_numpy(classes_CD), embed, preprocess, batch_size)
    top1, top5, predictions = by_numpy(labelled, classes_CD, labels)
    assert found.predictions == tuple(predictions)
    assert found.top1 == pytest.approx(top1)
    assert found.top5 == pytest.approx(top5)
    assert 0 < found.top1 < found.top5 < 1
    assert (found.images, found.classes, found.unreadable) == (IMAGES, CLASSES, 3)
    assert found.times_chance == pytest.approx(top1 * CLASSES)


def test_a_perfect_model_is_right_on_all_but_the_broken(labelled: LabelledSet, labels: np.ndarray) -> None:
    classes_CD = torch.eye(CLASSES)
    readable = iter(np.delete(labels, [7, 8, 39]))
    found = zero_shot(
        labelled, classes_CD, lambda pixels: torch.stack([classes_CD[next(readable)] for _ in pixels]), preprocess, 5
    )
    assert found.top1 == found.top5 == pytest.approx(37 / 40)


def test_fewer_than_five_classes_make_top5_certain(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("a\nb\nc\n")
    (tmp_path / "templates.txt").write_text("{c}\n")
    write_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg(), "0.cls": b"2"})
    found = zero_shot(LabelledSet(str(tmp_path)), torch.eye(3), lambda pixels: torch.eye(3)[:1], preprocess)
    assert (found.top1, found.top5) == (0, 1)


def test_class_embeddings_are_the_normalised_mean_of_unit_prompts() -> None:
    rng = np.random.default_rng(3)
    vectors = {f"{c}-{t}": unit(rng.standard_normal(WIDTH)) for c in range(4) for t in range(3)}
    prompts = [[f"{c}-{t}" for t in range(3)] for c in range(4)]
    expected = unit(np.stack([np.mean([vectors[text] for text in texts], axis=0) for texts in prompts]))
    found = class_embeddings(prompts, lambda texts: torch.from_numpy(np.stack([vectors[text] for text in texts])))
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_evaluate_is_the_same_by_hand(tmp_path: Path, sample: Path, clip: Clip, teacher_name: str) -> None:
    """The whole path on a slice of the sample's cifar10, with embeddings multiplied out in numpy."""
    source, folder = sample / "eval" / "cifar10", tmp_path / "small"
    write_tar(folder / "a.tar", read_tar(source / "test-00000.tar", 120))
    for name in ("classnames.txt", "templates.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    found = evaluate(teacher_name, [str(folder)], device="cpu")["small"]

    labelled = LabelledSet(str(folder))
    classes_CD = unit(
        np.stack([clip.encode_texts(texts).double().numpy().mean(axis=0) for texts in labelled.prompts()])
    )
    step = Preprocess(clip.identity.preprocessing)
    content = Path(labelled.items[0].file).read_bytes()
    datas = [content[item.offset : item.offset + item.size] for item in labelled.items]
    images_ND = np.concatenate([clip.encode_images(step(data)[None]).double().numpy() for data in datas])
    order_NC = np.argsort(-(images_ND @ classes_CD.T), axis=1)
    labels_N = np.array([item.label for item in labelled.items])
    assert found.predictions == tuple(order_NC[:, 0].tolist())
    assert found.top1 == pytest.approx((order_NC[:, 0] == labels_N).mean())
    assert found.top5 == pytest.approx((order_NC[:, :5] == labels_N[:, None]).any(axis=1).mean())
    assert found.top1 > 0.2
