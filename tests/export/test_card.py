"""The model card: true, valid for the Hub, harmless whatever names it shows. A user's own words in it stay."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from cache_schemas.evaluation import EvaluationResult
from cache_schemas.export import EXPORT_FILE, Export, ExportSource, OnnxFacts
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, StoreError
from dimefm.evaluation.results import read_results
from dimefm.export.card import Card, CardConfig, write_card
from dimefm.export.card_usage import usage
from dimefm.export.config import ExportConfig
from dimefm.export.export_student import export
from dimefm.images.preprocess import Preprocess
from dimefm.latency.record import read_latency
from dimefm.models.exported import read_export
from tests.latency.test_latency import measured
from tests.latency.test_latency import written as measurements
from tests.tiny_clip import write_clip

HOSTILE = "x|`[a](javascript:b) <script>alert(1)</script>\n---\nlicense: mit # *'\"\u202e\x1b[2J https://evil.example"


def card(folder: Path, **options: Any) -> Card:
    return write_card(str(folder), CardConfig(**options))


def change(folder: Path, **fields: Any) -> Export:
    """Give the document of an exported folder other fields."""
    document = dataclasses.replace(read_export(str(folder)), **fields)
    (folder / EXPORT_FILE).write_text(json.dumps(document.to_json()))
    return document


def write_results(folder: Path, result: EvaluationResult) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text(json.dumps(result.to_json()) + "\n")
    return str(folder)


def test_the_first_card_claims_no_results_and_is_valid_for_the_hub(exported: Path) -> None:
    found = ModelCard.load(exported / "README.md")
    assert (found.data.library_name, found.data.pipeline_tag) == ("open_clip", "zero-shot-image-classification")
    assert found.data.eval_results is None
    assert found.data.license is None
    for words in ("# student", "`test_resnet`", "images-00000.tar", "None has been measured", "author states none"):
        assert words in found.text
    origin = read_export(str(exported)).origin
    assert origin is not None
    assert {source.digest[:16] for source in origin.sources if source.digest} <= set(re.findall(r"\w{16}", found.text))


def test_measured_results_come_from_an_evaluation_of_the_same_weights(student: Path, evaluation: Path) -> None:
    (measured,) = read_results(str(evaluation))
    assert card(student, evaluation=(str(evaluation),), license="mit", data_license="COCO's terms").results == 1
    found = ModelCard.load(student / "README.md")
    (result,) = found.data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("accuracy", measured.value)
    assert found.data.license == "mit"
    low, high = (f"{100 * bound:.1f}" for bound in measured.interval)
    assert f"| top-1 | {100 * measured.value:.1f} | {low} to {high} | 200 |" in found.text
    assert "COCO's terms" in found.text
    (kept,) = read_results(str(student))
    assert (kept.metrics, kept.digests, kept.model["name"]) == (measured.metrics, measured.digests, "student")
    before = (student / "README.md").read_bytes()
    card(student)
    assert (student / "README.md").read_bytes() == before


def test_results_of_other_weights_are_refused(student: Path, evaluation: Path) -> None:
    before = (student / "README.md").read_bytes()
    change(student, model=dataclasses.replace(read_export(str(student)).model, weights="0" * 64))
    with pytest.raises(MismatchError, match="results of other weights"):
        card(student, evaluation=(str(evaluation),))
    assert (student / "README.md").read_bytes() == before
    assert not (student / "results.jsonl").exists()


def test_export_takes_the_results_of_the_run_itself(finished_run: Path, evaluation: Path, tmp_path: Path) -> None:
    export(str(finished_run), str(tmp_path / "out"), evaluation=(str(evaluation),), license="mit")
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert len(found.data.eval_results or []) == 1
    assert found.data.license == "mit"
    with pytest.raises(DimefmError, match="no effect on onnx"):
        ExportConfig(source="run", out="out", format="onnx", evaluation=("evaluations/run",))


def test_what_a_reader_of_the_numbers_must_know_is_in_the_card(student: Path, evaluation: Path, tmp_path: Path) -> None:
    (result,) = read_results(str(evaluation))
    result = dataclasses.replace(
        result,
        partial=("200 images, 10,000 published",),
        unreadable=3,
        notes=("3 images could not be read: a.jpg (cannot open /home/me/My pictures/a.jpg)",),
        settings={**result.settings, "decoder": "fast"},
    )
    card(student, evaluation=(write_results(tmp_path / "changed", result),))
    text = (student / "README.md").read_text()
    for words in ("partial: 200 images, 10,000 published", "3 images without features", "decoded by fast"):
        assert words in text
    for file in ("README.md", "results.jsonl"):
        assert "My pictures" not in (student / file).read_text()


def test_few_shot_results_are_taken_together(student: Path, evaluation: Path, tmp_path: Path) -> None:
    (result,) = read_results(str(evaluation))
    for seed, value in enumerate((0.2, 0.3)):
        one = dataclasses.replace(result, protocol=f"few-shot-5/honest/seed-{seed}", metrics={"top1": value})
        card(student, evaluation=(write_results(tmp_path / "seed", one),))
    found = ModelCard.load(student / "README.md")
    (pooled,) = found.data.eval_results or []
    assert (pooled.metric_value, pooled.task_type) == (0.25, "image-classification")
    assert "25.0 (standard deviation over seeds 7.1)" in found.text


def test_speed_is_that_of_the_same_weights(student: Path, tmp_path: Path) -> None:
    weights = read_export(str(student)).model.weights
    own = measured(weights=weights, name="/home/me/student", order=("/home/me/other",), load=1.7)
    models = [own, measured(weights="other")]
    card(student, latency=measurements(tmp_path / "latency.json", models))
    text = (student / "README.md").read_text()
    assert text.count("| pytorch in fp32 | 2 threads |") == 3
    assert "The machine was NOT QUIET: 1.7 of" in text
    assert "/home/me" not in text + (student / "latency.json").read_text()
    (kept,) = read_latency(str(student / "latency.json")).models
    assert (kept.name, kept.image) == ("student", models[0].image)
    card(student)
    assert (student / "README.md").read_text() == text
    with pytest.raises(MismatchError, match="no measurement of this model"):
        card(student, latency=measurements(tmp_path / "others.json", models[1:]))


def test_hostile_names_are_inert(student: Path, evaluation: Path, tmp_path: Path) -> None:
    (result,) = read_results(str(evaluation))
    result = dataclasses.replace(
        result, set=HOSTILE, notes=(HOSTILE,), protocol=HOSTILE, metric=HOSTILE, metrics={HOSTILE: 0.5}
    )
    before = read_export(str(student))
    assert before.origin is not None
    sources = (ExportSource(kind="image", store=HOSTILE, names=(HOSTILE,), digest=HOSTILE, unknown=HOSTILE),)
    config = {**before.origin.config, "init": HOSTILE, "text_student": HOSTILE}
    names = {
        "student": HOSTILE,
        "teacher": HOSTILE,
        "machine": HOSTILE,
        "repository": HOSTILE,
        "versions": {"x": HOSTILE},
    }
    origin = dataclasses.replace(before.origin, **names, sources=sources, config=config)
    change(student, origin=origin, model=dataclasses.replace(before.model, name=HOSTILE, tokenizer=HOSTILE))
    card(student, evaluation=(write_results(tmp_path / "hostile", result),), data_license=HOSTILE)
    found = ModelCard.load(student / "README.md")
    assert found.data.license is None
    assert set(found.data.to_dict()) == {"library_name", "pipeline_tag", "tags", "model-index", "data_license"}
    text = (student / "README.md").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "://" not in re.sub(r"(?<!\\)`[^`]*`", "", found.text)  # the Hub would make a link of it
    shown = MarkdownIt("commonmark").enable("table").render(found.text)
    assert "<script" not in shown
    assert set(re.findall(r'href="([^"]*)"', shown)) == {"results.jsonl"}
    rows = re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
    assert {len(re.findall(r"<t[dh]", row)) for row in rows} == {2, 5, 6}
    assert card(student).results == 1  # the card is recognised


def test_a_users_own_words_and_metadata_stay(student: Path) -> None:
    readme = student / "README.md"
    head, _, rest = readme.read_text().partition("---\n<!--")
    head = head.replace("- clip\n", "- clip\n- boats\n") + "language: en\nlicense: cc-by-4.0\n"
    readme.write_text(f"{head}---\nAbove.\n<!--{rest}\nBelow.\n")
    card(student, data_license="free")
    found = ModelCard.load(readme)
    assert found.text.startswith("Above.\n")
    assert found.text.endswith("\nBelow.\n")
    assert "boats" in (found.data.tags or [])
    assert (found.data.language, found.data.license) == ("en", "cc-by-4.0")
    assert "`cc-by-4.0`" in found.text


@pytest.mark.parametrize("edit", [("It has its teacher's errors", "It is flawless"), ("value: 0", "value: 1")])
def test_a_card_that_was_changed_where_dimefm_writes_is_not_overwritten(
    edit: tuple[str, str], student: Path, evaluation: Path
) -> None:
    card(student, evaluation=(str(evaluation),))
    readme = student / "README.md"
    before = readme.read_text()
    readme.write_text(before.replace(*edit) + "Mine.\n")
    assert readme.read_text() != before + "Mine.\n"
    with pytest.raises(OutputExistsError, match="changed where dimefm writes"):
        card(student)
    card(student, overwrite=True)
    assert readme.read_text() == before + "Mine.\n"


def test_a_card_of_another_hand_is_replaced_only_if_asked(student: Path) -> None:
    (student / "README.md").write_text("# Mine\n")
    with pytest.raises(OutputExistsError, match="was not written by dimefm"):
        card(student)
    card(student, overwrite=True)
    (student / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(StoreError, match="metadata are not YAML"):
        card(student)
    (student / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="is not UTF-8"):
        card(student)


def test_what_is_no_export_and_no_licence_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no exported model(?s:.*)dimefm export"):
        card(finished_run)
    with pytest.raises(StoreError, match="is no exported model"):
        card(tmp_path / "nothing")
    with pytest.raises(DimefmError, match=r"did you mean 'apache-2\.0'"):
        CardConfig(license="apache-2")


def run_code(folder: Path, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the code of a card prints in its folder."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(folder / "image.jpg")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "form",
    ["open_clip", *(pytest.param(form, marks=pytest.mark.slow) for form in ("onnx", "transformers"))],
)
def test_the_code_of_the_card_runs(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    export(write_clip(tmp_path / "clip"), str(folder), format=form)
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    found = run_code(folder, code, capsys, monkeypatch)
    if form == "transformers":
        found = {one["label"]: one["score"] for one in found}
    assert set(found) == {"cat", "dog", "boat"}
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("mode", "size"), [("shortest", (32, 32)), ("squash", (24, 32)), ("longest", (32, 32))])
def test_the_code_for_onnx_prepares_images_as_dimefm_does(mode: Any, size: tuple[int, int], exported: Path) -> None:
    document = read_export(str(exported))
    facts = dataclasses.replace(document.model.preprocessing, resize_mode=mode, size=size)
    onnx = OnnxFacts(opset=18, image_input="uint8", quantized={})
    document = dataclasses.replace(
        document, format="onnx", model=dataclasses.replace(document.model, preprocessing=facts), onnx=onnx
    )
    lines = usage(document)
    begin = next(number for number, line in enumerate(lines) if line.startswith("image = Image.open")) + 1
    end = next(number for number, line in enumerate(lines) if line.startswith("tokens ="))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), np.uint8)).resize((970, 610))
    names: dict[str, Any] = {"image": image, "np": np}
    exec("from PIL import Image, ImageOps\n" + "\n".join(lines[begin:end]), names)
    expected = Preprocess(facts, exact=True).apply(image).numpy()
    assert names["pixels"].shape == (1, *expected.shape)
    assert np.abs(names["pixels"][0].astype(int) - expected).max() <= (0 if mode != "longest" else 2)


def test_the_code_of_a_model_with_a_logit_bias_gives_each_class_its_own_probability(exported: Path) -> None:
    document = read_export(str(exported))
    document = dataclasses.replace(document, model=dataclasses.replace(document.model, logit_bias=-3.0))
    assert "    probabilities = (logits + model.logit_bias).sigmoid()" in usage(document)
    onnx = OnnxFacts(opset=18, image_input="uint8", quantized={})
    lines = usage(dataclasses.replace(document, format="onnx", onnx=onnx))
    names: dict[str, Any] = {"np": np, "logits": np.array([3.0, 4.0])}
    exec(next(line for line in lines if line.startswith("probabilities")), names)
    assert names["probabilities"] == pytest.approx([0.5, 1 / (1 + np.exp(-1))])
