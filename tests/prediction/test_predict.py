"""`dimefm predict`: probabilities that are those of evaluate, on whatever names images, and what is shown of them.

Shapes: N images, C classes.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy.special import softmax

from dimefm.cli import cli
from dimefm.errors import DimefmError, SourceError, TeacherError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.evaluation.predictions import read_scores
from dimefm.prediction import predict as module
from dimefm.prediction.config import PredictConfig
from dimefm.prediction.pictures import Picture, read_picture
from dimefm.prediction.predict import Prediction, Unreadable, open_predictor
from tests.making import encoded, make_jpeg, picture, write_tar
from tests.tiny_onnx import write_onnx

CLASSES = ("cat", "dog", "a red ship")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ONNX student."""
    return write_onnx(tmp_path_factory.mktemp("onnx") / "student")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with images in a folder, one of which is cut short, and something else in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    (tmp_path / "photos" / "red.jpg").write_bytes(make_jpeg(colour=(220, 30, 30)))
    (tmp_path / "photos" / "deep" / "green.png").write_bytes(encoded(picture(colour=(20, 200, 30)), "PNG"))
    (tmp_path / "photos" / "cut.jpg").write_bytes(make_jpeg()[:300])
    (tmp_path / "photos" / "notes.txt").write_text("nothing")
    return tmp_path


def run(*arguments: object, given: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["predict", *map(str, arguments)], input=given)


def outcomes(model: str, *images: str, **options: object) -> list[Prediction | Unreadable]:
    fields = {"classes": CLASSES, "device": "cpu"} if "classes_from" not in options else {"device": "cpu"}
    with open_predictor(PredictConfig(model=model, images=images, **{**fields, **options})) as predictor:
        return list(predictor.run())


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["onnx", "open_clip"])
def test_it_agrees_with_evaluate(kind: str, student: str, teacher_name: str, cifar10: str, tmp_path: Path) -> None:
    """On the same images, classes and templates. The scores that evaluate keeps are by CLIP's logit scale of 100, those
    here by the model's own."""
    model = student if kind == "onnx" else teacher_name
    config = EvaluationConfig(model=model, folders=(cifar10,), out=str(tmp_path), name="m", predictions=True)
    assert evaluate(config).results
    score_NC = read_scores(str(next((tmp_path / "m" / "predictions").glob("*.parquet"))))
    names, templates = (f"{cifar10}/{name}.txt" for name in ("classnames", "templates"))
    found = outcomes(model, cifar10, classes_from=names, templates=templates, top_k=10)
    by_name = [{guess.name: guess for guess in one.guesses} for one in found if isinstance(one, Prediction)]
    order = Path(names).read_text().splitlines()
    cosine_NC = np.array([[guesses[name].cosine for name in order] for guesses in by_name])
    chance_NC = np.array([[guesses[name].probability for name in order] for guesses in by_name])
    np.testing.assert_allclose(softmax(100 * cosine_NC, axis=1), score_NC, atol=1e-4)
    np.testing.assert_allclose(softmax((20 if kind == "onnx" else 1 / 0.07) * cosine_NC, axis=1), chance_NC)
    for one in found:
        assert isinstance(one, Prediction)
        assert [*one.guesses] == sorted(one.guesses, key=lambda guess: -guess.probability)


def test_a_model_with_a_logit_bias_gives_each_class_its_own_probability(here: Path, tmp_path: Path) -> None:
    model = write_onnx(tmp_path / "siglip", logit_bias=-3.0)
    result = run(model, "photos/red.jpg", "--classes", "cat", "--json")
    (image,) = json.loads(result.stdout)["images"]
    (only,) = image["classes"]
    assert only["probability"] == pytest.approx(1 / (1 + np.exp(3 - 20 * only["cosine"])))
    assert json.loads(result.stdout)["probabilities"] == "sigmoid"
    assert "each class has a probability of its own" in result.stderr


def test_results_come_while_further_images_are_read(student: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many images only a batch, and some ahead of it, are held."""
    read, lock = [], threading.Lock()

    def count(one: Picture) -> bytes:
        with lock:
            read.append(one)
        return read_picture(one)

    monkeypatch.setattr(module, "read_picture", count)
    monkeypatch.setattr(module, "cpus", lambda: 2)
    for number in range(60):
        (here / "photos" / f"{number}.jpg").write_bytes(make_jpeg(seed=number))
    with open_predictor(PredictConfig(model=student, images=("photos",), classes=CLASSES)) as predictor:
        assert next(predictor.run())
        assert len(read) <= 16 + 3
        assert len(list(predictor.run())) == 63


# -- what names images ------------------------------------------------------------------------------------------------


def test_folders_globs_tars_and_urls(student: str, here: Path) -> None:
    write_tar(here / "more.tar", {"a.jpg": make_jpeg(), "b.png": encoded(picture(), "PNG")})
    result = run(student, "photos", "more.tar", "--classes", "cat,dog", "--top-k", 1)
    assert [line.split()[-2:] for line in result.stdout.splitlines()] == [
        [result.stdout.split()[1], "photos/deep/green.png"],
        [result.stdout.split()[4], "photos/red.jpg"],
        ["more.tar:", "a"],
        ["more.tar:", "b"],
    ]
    assert result.stderr.splitlines()[0].startswith("not used: files that end in .txt: 1")
    assert "photos/cut.jpg: Truncated File Read\n1 of 5 images could not be read\n" in result.stderr
    assert result.exit_code == 0
    by_glob = run(student, "photos/*/*.p?g", f"file://{here}/photos/red.jpg", "--classes", "cat,dog", "--top-k", 1)
    assert by_glob.stdout.splitlines() == result.stdout.splitlines()[:2]


def test_an_image_on_standard_input(student: str, here: Path) -> None:
    data = (here / "photos" / "red.jpg").read_bytes()
    piped, named = (run(student, one, "--classes", "cat,dog", given=data) for one in ("-", "photos/red.jpg"))
    assert piped.stdout == named.stdout.replace("photos/red.jpg", "-")
    mistaken = run(student, "-", "--classes", "cat,dog", given=b"photos/red.jpg\n")
    assert "for a list of paths give --images-from -" in mistaken.stderr
    assert mistaken.exit_code == 1


@pytest.mark.parametrize(("ending", "end"), [("\n", "\n"), ("\r\n", ""), ("\0", "\0")])
def test_a_list_of_images(student: str, here: Path, ending: str, end: str) -> None:
    names = ["photos/red.jpg", "gone.jpg", "photos", f"{here}/photos/deep/green.png", "http://localhost/x.jpg"]
    listed = ending.join(names) + end
    (here / "list.txt").write_text(listed, newline="")
    for source in ("-", "list.txt"):
        result = run(student, "--images-from", source, "--classes", "cat,dog", "--json", given=listed.encode())
        document = json.loads(result.stdout)
        assert [one["image"] for one in document["images"]] == [names[0], names[3]]
        assert [one["image"] for one in document["unreadable"]] == [*names[1:3], names[4]]
        reasons = [one["reason"] for one in document["unreadable"]]
        assert reasons[:2] == ["it does not exist", "it is a folder: name it as an argument"]
        assert "http:// is not opened because a document names it" in reasons[2]
        assert (result.exit_code, "3 of 5 images could not be read" in result.stderr) == (0, True)


def test_it_exits_with_1_where_no_image_can_be_read(student: str, here: Path) -> None:
    for words in ([], ["--json"]):
        result = run(student, "photos/cut.jpg", "--classes", "cat,dog", *words)
        assert result.exit_code == 1
        assert "photos/cut.jpg: Truncated File Read\nError: the image could not be read\n  remedy: " in result.stderr


# -- classes ----------------------------------------------------------------------------------------------------------


def test_classes_and_templates_in_files(student: str, here: Path) -> None:
    (here / "classes.txt").write_bytes("\ufeffcat\r\na red ship\r\ncat\r\n\r\n".encode())
    (here / "templates.txt").write_text("a photo of a {c}.\n")
    words = ("photos/red.jpg", "--templates", "templates.txt")
    result = run(student, *words, "--classes-from", "classes.txt")
    assert result.stderr == "the class 'cat' is named 2 times, and counts once\n"
    assert result.stdout == run(student, "photos/red.jpg", "--classes", " cat ,a  red ship").stdout
    (here / "templates.txt").write_text("{} on a dark sea\na drawing of {c}\n")
    assert run(student, *words, "--classes-from", "classes.txt").stdout != result.stdout


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"classes": ("cat", "")}, "--classes has an empty name"),
        ({"classes": ("cat",)}, "'cat' is the only class, and would have 100% of every image"),
        ({"classes": ("list.txt",)}, "list.txt is a file, not a class\n  remedy: give --classes-from list.txt"),
        ({"classes_from": "lst.txt"}, "lst.txt does not exist\n  remedy: did you mean 'list.txt'"),
        ({"classes_from": "set"}, "set is a folder\n  remedy: name set/classnames.txt"),
        ({"classes_from": "list.txt"}, "list.txt, line 2 is blank"),
        ({"templates": "set/classnames.txt"}, r"classnames.txt, line 1: 'cat' has no \{c\}"),
        ({"images": ("nowhere",)}, "nowhere does not exist"),
        ({"images_from": "nowhere"}, "nowhere: No such file"),
        ({"images_from": "/dev/null", "images": ()}, "/dev/null names no image"),
    ],
)
def test_a_mistake_is_found_before_the_model_is_loaded(
    here: Path, options: dict[str, object], what: str, request: pytest.FixtureRequest
) -> None:
    (here / "list.txt").write_text("cat\n\ndog\n")
    (here / "set").mkdir()
    (here / "set" / "classnames.txt").write_text("cat\n")
    model = request.getfixturevalue("student") if "only class" in what else "no model"
    with pytest.raises(DimefmError, match=what):
        outcomes(model, *options.pop("images", ("photos",)), **options)  # type: ignore[misc]


def test_what_an_onnx_model_does_not_leave_to_choose(student: str, here: Path) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(TeacherError, match="is an ONNX model, which runs on the CPU here"):
            outcomes(student, "photos", device=device)
    assert "--mean would have no effect" in run(student, "photos", "--classes", "a,b", "--mean", "0,0,0").output


def test_names_of_classes_and_files_are_inert(student: str, here: Path) -> None:
    (here / "photos" / "a\x1b[31m\n.jpg").write_bytes(make_jpeg())
    (here / "photos" / "b\x1b[31m\n.jpg").write_bytes(b"")
    for words in (("--top-k", 1), (), ("--json",)):
        result = run(student, "photos", "--classes", "cat\x1b[31m,dog", *words)
        assert "\x1b" not in result.output
        assert result.exit_code == 0
    assert r"photos/b\x1b[31m\n.jpg: no bytes" in result.stderr


def test_no_image_is_an_error(student: str, here: Path) -> None:
    write_tar(here / "empty.tar", {"notes.txt": b"x"})
    with pytest.raises(SourceError, match=r"no image in empty\.tar"):
        outcomes(student, "empty.tar")


# -- a command in a shell ---------------------------------------------------------------------------------------------


def test_a_reader_that_has_enough_ends_it_without_a_word(
    student: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `| head` does."""

    def stop(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("dimefm.commands.prediction.say", stop)
    result = run(student, "photos/red.jpg", "--classes", "cat,dog")
    assert (result.exit_code, result.output) == (1, "")
