"""`dimefm latency`: what is measured, how it is recorded, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from cache_schemas.document import to_plain
from cache_schemas.export import EXPORT_FILE, Export, OnnxFacts
from cache_schemas.latency import Latency, Machine, ModelLatency, Timing
from dimefm.cli import cli
from dimefm.errors import OutputExistsError
from dimefm.latency.config import LatencyConfig
from dimefm.latency.measure import _timing, this_machine
from dimefm.latency.record import Record, read_latency
from dimefm.latency.subject import subjects
from dimefm.latency.table import noise
from dimefm.models.clip import Clip
from dimefm.models.flops import count_flops
from dimefm.models.tokenizer_file import write_tokenizer


def timing(batch: int = 1, ms: float = 2.0, slowest: float = 1.05) -> Timing:
    return Timing(batch=batch, median_ms=ms, p95_ms=slowest * ms, spread=0.01, calls=10)


def measured(**changes: Any) -> ModelLatency:
    fields: dict[str, Any] = {
        "name": "student", "weights": "w", "backend": "pytorch", "precision": "fp32", "device": "cpu", "threads": 2,
        "parameters": 3_000_000, "image_parameters": 1_000_000, "image_flops": 5 * 10**9, "text_flops": None,
        "bytes": 12_000_000, "memory": 10**8, "image": (timing(), timing(8, 1.0)), "text": (timing(),),
        "load": 0.1, "order": ("student (pytorch)",), "versions": {"torch": "2"}, "finished": "now",
    }  # fmt: skip
    return ModelLatency(**(fields | changes))


def written(path: Path, models: Sequence[ModelLatency]) -> str:
    path.write_text(json.dumps(Latency(machine=this_machine(), models=tuple(models)).to_json()))
    return str(path)


def onnx_folder(folder: Path, clip: Clip, quantized: bool = False) -> str:
    """An export of two graphs so small that nothing is to be measured: the mean of each channel, and two tokens."""
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir()
    towers = (
        ("vision_model.onnx", "pixel_values", TensorProto.FLOAT, ["B", 3, 32, 32], "image_embeds",
         [helper.make_node("GlobalAveragePool", ["pixel_values"], ["image_embeds"])]),
        ("text_model.onnx", "input_ids", TensorProto.INT64, ["B", 32], "text_embeds",
         [helper.make_node("Cast", ["input_ids"], ["text_embeds"], to=TensorProto.FLOAT)]),
    )  # fmt: skip
    for file, name, kind, shape, output, nodes in towers:
        ins = [helper.make_tensor_value_info(name, kind, shape)]
        outs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        model = helper.make_model(
            helper.make_graph(nodes, "tower", ins, outs), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
        )
        onnx.save(model, str(folder / file))
    write_tokenizer(clip.tokenizer, folder, clip.identity.context_length)
    facts = OnnxFacts(
        opset=18, image_input="float32", quantized={"vision_model.onnx": "static int8"} if quantized else {}
    )
    document = Export(
        format="onnx", model=replace(clip.identity, name="small", weights="o"), text_tower="t", parameters=7,
        image_parameters=3, image_flops=11, text_flops=13, versions={}, onnx=facts,
    )  # fmt: skip
    (folder / EXPORT_FILE).write_text(json.dumps(document.to_json()))
    return str(folder)


def test_models_are_measured_beside_each_other_and_one_that_fails_is_named(
    tmp_path: Path, clip: Clip, teacher_name: str
) -> None:
    """In processes of their own, PyTorch and onnxruntime; an ONNX export knows its FLOPs without torch."""
    damaged = Path(onnx_folder(tmp_path / "damaged", clip))
    (damaged / "vision_model.onnx").write_bytes(b"no graph")
    small = onnx_folder(tmp_path / "small", clip, quantized=True)
    words = ["latency", teacher_name, small, str(damaged), "--batch", "4,1", "--threads", "1", "--seconds", "0.01"]
    out = tmp_path / "out.json"
    result = CliRunner().invoke(cli, [*words, "--out", str(out), "--json", "--quiet"])
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    (failed,) = found["failed"]
    assert failed["model"] == str(damaged)
    assert "vision_model.onnx cannot be loaded" in failed["what"]
    assert failed["remedy"] == "export the model again"
    torch, onnx = read_latency(str(out)).models
    assert [to_plain(torch), to_plain(onnx)] == found["models"]
    assert (torch.name, torch.backend, torch.weights) == ("tiny", "pytorch", clip.identity.weights)
    assert (onnx.name, onnx.backend, onnx.weights) == ("small", "int8", "o")
    assert (torch.parameters, torch.image_parameters) == clip.parameter_counts()
    assert (torch.image_flops, torch.text_flops) == count_flops(clip)
    assert (onnx.image_flops, onnx.text_flops) == (11, 13)
    assert torch.order == onnx.order == ("tiny (pytorch)", "small (int8)")
    for one in (torch, onnx):
        assert [t.batch for t in one.image] == [t.batch for t in one.text] == [1, 4]
        assert all(t.calls >= 10 and 0 < t.median_ms <= t.p95_ms for t in (*one.image, *one.text))
    # The weights of the tiny CLIP are 3.2 MB, most of it the vocabulary's.
    assert torch.memory is None or 3e6 < torch.memory < 100e6
    assert onnx.bytes == sum(file.stat().st_size for file in Path(small).glob("*.onnx"))


def test_which_ways_a_model_is_run(tmp_path: Path, clip: Clip, teacher_name: str) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"")
    models = (onnx_folder(tmp_path / "plain", clip), onnx_folder(tmp_path / "int8", clip, True), teacher_name)
    config = LatencyConfig(models=(*models, "ViT-B-32:openai", f"ViT-B/32:{weights}"), compiled=True, device="cuda")
    found = [(one.name, one.backend, one.device) for one in subjects(config)]
    assert found == [
        ("plain", "onnx", "cpu"),
        ("int8", "int8", "cpu"),
        ("tiny", "pytorch", "cuda"),
        ("tiny", "compiled", "cuda"),
        ("ViT-B-32:openai", "pytorch", "cuda"),
        ("ViT-B-32:openai", "compiled", "cuda"),
        ("weights.pt", "pytorch", "cuda"),
        ("weights.pt", "compiled", "cuda"),
    ]


def test_the_teacher_of_a_run_is_added_once_and_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_name: str, clip: Clip
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    identity = replace(clip.identity, name=teacher_name)
    monkeypatch.setattr("dimefm.latency.subject.read_run", lambda run: SimpleNamespace(teacher=identity))
    runs = (str(tmp_path / "a"), str(tmp_path / "b"))
    chosen = subjects(LatencyConfig(models=runs, with_teacher=True, compiled=True))
    found = [(one.name, one.backend, one.run) for one in chosen]
    assert found == [
        ("a", "pytorch", None),
        ("a", "compiled", None),
        ("tiny", "pytorch", runs[0]),
        ("b", "pytorch", None),
        ("b", "compiled", None),
    ]
    chosen = subjects(LatencyConfig(models=(teacher_name, *runs), with_teacher=True, compiled=True))
    assert [one.backend for one in chosen if one.name == "tiny"] == ["pytorch", "compiled"]


def test_models_of_the_same_name_keep_their_paths(tmp_path: Path, clip: Clip) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    models = tuple(onnx_folder(tmp_path / one / "student", clip) for one in "ab")
    assert [one.name for one in subjects(LatencyConfig(models=models))] == list(models)


def test_the_figures_of_calls() -> None:
    """Rounds in seconds, with a batch of two; milliseconds per image."""
    found = _timing(2, [[0.002] * 10, [0.003] * 10, [0.0028] * 9 + [1.0]])
    assert found.calls == 30
    assert found.median_ms == pytest.approx(1.4)
    assert found.p95_ms == pytest.approx(1.5)
    assert found.spread == pytest.approx(0.5 / 2 / 1.4)
    assert found.per_second == pytest.approx(1000 / 1.4)
    assert _timing(1, [[0.001], [0.002]]).p95_ms == pytest.approx(2)


def test_measurements_are_added_and_the_last_of_a_kind_counts(tmp_path: Path) -> None:
    path = str(tmp_path / "latency.json")
    Record(path, this_machine()).add([measured(), measured(threads=1)])
    Record(path, this_machine()).add([measured(parameters=5), measured(backend="compiled")])
    found = [(one.backend, one.threads, one.parameters) for one in read_latency(path).models]
    assert found == [("pytorch", 1, 3_000_000), ("pytorch", 2, 5), ("compiled", 2, 3_000_000)]
    other = replace(this_machine(), processor="another")
    with pytest.raises(OutputExistsError, match="of another machine"):
        Record(path, other)


def test_a_noisy_machine_is_said() -> None:
    machine = Machine(processor="CPU", cores=2, instructions=("avx2",), system="Linux")
    assert noise(machine, [measured()]) == ""
    assert "1.9 of 2 cores were busy" in noise(machine, [measured(load=1.9)])
    shaken = measured(image=(timing(slowest=2.0), timing(slowest=2.0)))
    assert "in 2 of 3 timings the 95th percentile is 1.5 times the median" in noise(machine, [shaken])
