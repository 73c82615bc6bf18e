"""Graphs of small modules: their bytes, half weights, weights apart, and modules that cannot be exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dimefm.errors import DimefmError
from dimefm.export import onnx_graph
from dimefm.export.onnx_format import digest_graph
from dimefm.export.onnx_graph import write_graph


class Tower(nn.Module):
    """Linear, with one weight that is larger than float16 can be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 32)
        self.large = nn.Parameter(torch.full((32,), 1e6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) / self.large  # type: ignore[no-any-return]


def write(path: Path, module: nn.Module | None = None, half: bool = False) -> Path:
    tower = module or Tower()
    write_graph(tower, torch.zeros(2, 48), path, names=("x", "y"), facts={"embed_dim": "32"}, half=half)
    return path


def answer(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["y"], {"x": inputs.numpy()})[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("graphs") / "tower.onnx")


def test_a_graph_says_nothing_of_where_it_was_made(whole: Path) -> None:
    data = whole.read_bytes()
    for word in (b".py", b"site-packages", b"stack_trace", b"Tower", str(Path(__file__).parents[2]).encode()):
        assert word not in data
    import onnx

    model = onnx.load(str(whole))
    assert (model.producer_name, [(one.key, one.value) for one in model.metadata_props]) == (
        "dimefm", [("embed_dim", "32")],
    )  # fmt: skip
    assert [one.version for one in model.opset_import] == [onnx_graph.OPSET]


def test_half_weights_are_half_the_bytes_and_compute_in_float32(whole: Path, tmp_path: Path) -> None:
    half = write(tmp_path / "half.onnx", half=True)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    inputs = torch.randn(5, 48)
    expected = Tower()(inputs).detach()
    torch.testing.assert_close(answer(whole, inputs), expected, rtol=1e-5, atol=1e-11)
    rounded = Tower()
    for tensor in (rounded.first.weight, rounded.first.bias, rounded.second.weight, rounded.second.bias):
        tensor.data = tensor.data.half().float()
    torch.testing.assert_close(answer(half, inputs), rounded(inputs).detach(), rtol=1e-4, atol=1e-11)


def test_large_weights_go_to_a_file_beside_the_graph(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "_MOST_INSIDE", 1000)
    apart = write(tmp_path / "apart.onnx")
    assert sorted(path.name for path in tmp_path.glob("apart*")) == ["apart.onnx", "apart.onnx.data"]
    inputs = torch.randn(3, 48)
    assert torch.equal(answer(apart, inputs), answer(whole, inputs))
    before = digest_graph(apart)
    weights = np.fromfile(f"{apart}.data", np.uint8)
    weights[0] ^= 1
    weights.tofile(f"{apart}.data")
    assert digest_graph(apart) != before


@pytest.mark.slow
def test_a_graph_has_the_same_bytes_each_time(whole: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "tower.onnx").read_bytes() == whole.read_bytes()


class Branching(nn.Module):
    """Its way depends on its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


@pytest.mark.slow
def test_a_module_that_cannot_be_exported_says_why_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(DimefmError, match=r"torch cannot export it to ONNX: .*data-dependent") as caught:
        write(tmp_path / "tower.onnx", Branching())
    assert len(str(caught.value)) < 300
    assert not any(tmp_path.iterdir())
