"""A text tower distilled beside the image tower: trained, resumed, validated, exported; and first weights."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from dimefm.errors import StoreError, TeacherError, TrainingError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.export.export_student import export
from dimefm.models.first_weights import load_first_weights
from dimefm.models.towers import build_student, build_text_student, student_spec, tokenizer_of
from dimefm.store.embedding_store import Store
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.run_folder import read_run
from dimefm.training.train import train
from tests.e2e.test_kill import equal, flat
from tests.stores import teacher_identity
from tests.tiny_training import tiny_config

COSINE = LossConfig(vl=0, pvl=0, cosine=1)


@pytest.fixture(scope="module", autouse=True)
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An open_clip model of two small towers, known by name."""
    folder = tmp_path_factory.mktemp("configs")
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (folder / "small-clip.json").write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def run(image_store: Store, text_store: Store, cifar10: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both towers, with moving averages, validated with its own text tower."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(
        image_store, text_store, out, student="small-clip", text_student="small-clip", text_batch_size=32, epochs=12,
        max_steps=40, log_every=1, lr=2e-3, loss=COSINE, text_loss=LossConfig(vl=0.1, pvl=0, cosine=1), ema=0.8,
        val=(cifar10,), val_every=12,
    )  # fmt: skip
    train(config)
    return out


def test_the_text_tower_learns_the_cached_embeddings(run: Path) -> None:
    lines = [line for line in read_metrics(str(run)) if line["event"] == "train"]
    assert {"text_loss", "text_vl", "text_cosine"} <= lines[0].keys()
    first, last = (sum(line["text_cosine"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < 0.85 * first
    # The loss that is minimised is the sum of both towers'; each is logged.
    assert lines[0]["text_loss"] == pytest.approx(0.1 * lines[0]["text_vl"] + lines[0]["text_cosine"], rel=1e-5)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_export_is_small_on_both_sides_and_needs_no_teacher(
    run: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TeacherError, match="has a text tower of its own: --teacher has no effect"):
        export(str(run), str(tmp_path / "s"), weights=weights, teacher="there is none")
    monkeypatch.setattr("dimefm.models.clip.require_teacher", None)  # as an export with a teacher calls it
    export(str(run), str(tmp_path / "s"), weights=weights)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 's'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 's'}")
    document, state = read_run(str(run)), Checkpoints(str(run)).load()
    assert state is not None
    assert document.text_student is not None
    tower = build_text_student(document.text_student).eval()
    tower.load_state_dict(state["text"]["model"] if weights == "model" else state["text"]["ema"]["weights"])
    texts = ["a photo of a dog.", "two boats on a lake"]
    assert torch.equal(tokenizer(texts), tokenizer_of(document.text_student)(texts))
    with torch.inference_mode():
        mine, theirs = tower(tokenizer_of(document.text_student)(texts)), model.eval().encode_text(tokenizer(texts))
    torch.testing.assert_close(mine, theirs)
    assert sum(p.numel() for p in model.text.parameters()) < 2e6
    assert float(model.logit_scale.detach().exp()) == pytest.approx(document.teacher.logit_scale, rel=1e-5)


def test_validation_is_what_evaluate_finds_for_both_kinds_of_weights(run: Path, cifar10: str, tmp_path: Path) -> None:
    last = [line for line in read_metrics(str(run)) if line["event"] == "validation"][-1]
    digests = set()
    for weights, name in (("model", "cifar10"), ("ema", "cifar10_ema")):
        done = evaluate(
            EvaluationConfig(model=str(run), folders=(cifar10,), out=str(tmp_path), weights=weights, decoder="fast")
        )
        assert [result.metrics["top1"] for result in done.results] == [last[name]]
        assert Path(done.folder).name == ("run" if weights == "model" else "run-ema")
        digests |= {(str(r.model["weights"]), str(r.model["text_tower"])) for r in done.results}
    assert len(digests) == 2


def test_both_towers_resume_to_the_last_bit(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        image_store, text_store, tmp_path / "whole", student="small-clip", text_student="small-clip",
        text_batch_size=48, ema=0.9, loss=LossConfig(queue=24), checkpoint_every=2, max_steps=6,
    )  # fmt: skip
    train(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    save = Checkpoints.save

    def interrupted(self: Checkpoints, step: int, *args: object) -> None:
        save(self, step, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    monkeypatch.undo()
    train(replace(parts, workers=2))
    one, other = (flat(Checkpoints(c.out).load()) for c in (config, parts))
    assert one.keys() == other.keys()
    assert [name for name in one if not equal(one[name], other[name])] == []


def test_an_average_that_was_not_kept_cannot_be_exported(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", student="small-clip", max_steps=1)
    train(config)
    with pytest.raises(StoreError, match="no moving average"):
        export(config.out, str(tmp_path / "s"), weights="ema")


def test_a_text_tower_that_does_not_exist_is_refused(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no model of open_clip is called 'small-clap'"):
        train(tiny_config(image_store, text_store, tmp_path / "run", text_student="small-clap", text_batch_size=8))
    with pytest.raises(TrainingError, match="a text batch of 5,000 sentences is more than the 200"):
        train(tiny_config(
            image_store, text_store, tmp_path / "run", text_student="small-clip", text_batch_size=5000
        ))  # fmt: skip
    with pytest.raises(TrainingError, match="a text tower has no pairs"):
        tiny_config(image_store, text_store, tmp_path, text_student="small-clip", text_loss=LossConfig(contrastive=1))


# -- first weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual."])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_first_weights_from_a_file_are_all_but_a_projection_of_another_width(
    tmp_path: Path, prefix: str, kind: str
) -> None:
    spec = student_spec("small-clip", teacher_identity())
    given = build_student(replace(spec, embed_dim=24)).state_dict()
    path = tmp_path / f"weights.{kind}"
    state = {prefix + name: value.contiguous() for name, value in given.items()}
    if kind == "pt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    tower = build_student(spec)
    assert load_first_weights(tower, spec, str(path)) == ["proj"]
    assert all(torch.equal(value, given[name]) for name, value in tower.state_dict().items() if name != "proj")


def test_first_weights_of_a_bare_timm_model_find_their_trunk(tmp_path: Path) -> None:
    spec = student_spec("test_resnet", teacher_identity(), 64)
    given = timm.create_model("test_resnet", pretrained=False).state_dict()
    save_file(given, tmp_path / "timm.safetensors")
    tower = build_student(spec)
    assert set(load_first_weights(tower, spec, str(tmp_path / "timm.safetensors"))) == {"head.proj.weight"}
    name = next(iter(given))
    assert torch.equal(tower.state_dict()[f"trunk.{name}"], given[name])


def test_first_weights_from_an_exported_student_begin_a_run(
    run: Path, image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    export(str(run), str(tmp_path / "student"))
    config = tiny_config(
        image_store, text_store, tmp_path / "run", student="small-clip", init=str(tmp_path / "student"),
        loss=COSINE, max_steps=1, lr=1e-9, warmup_epochs=0, min_lr=0.0,
    )  # fmt: skip
    train(config)
    before, after = Checkpoints(str(run)).load(), Checkpoints(config.out).load()
    assert before is not None
    assert after is not None
    for name, value in after["image"]["model"].items():
        torch.testing.assert_close(value, before["image"]["model"][name], rtol=0, atol=1e-6)


def test_weights_that_do_not_fit_or_do_not_exist_are_refused(tmp_path: Path) -> None:
    spec = student_spec("small-clip", teacher_identity())
    other = build_student(student_spec("small-clip", teacher_identity(), 64)).state_dict()
    save_file(other, tmp_path / "w.safetensors")
    tower = build_student(spec)
    with pytest.raises(TrainingError, match=r"does not fit small-clip: positional_embedding \(5, 64\) is of shape"):
        load_first_weights(tower, spec, str(tmp_path / "w.safetensors"))
    with pytest.raises(TrainingError, match="is no file, no folder and no tag of open_clip for small-clip"):
        load_first_weights(tower, spec, "laion400m_e32")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_first_weights(tower, spec, str(tmp_path / "broken.pt"))


def test_an_average_asked_for_later_begins_with_the_weights(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", student="small-clip", max_steps=2, loss=COSINE)
    train(config)
    train(replace(config, ema=0.5, max_steps=3), allow_changes=("ema", "max_steps"))
    state = Checkpoints(config.out).load()
    assert state is not None
    average, model = state["image"]["ema"]["weights"], state["image"]["model"]
    distance = sum(float(F.mse_loss(average[name].float(), model[name].float())) for name in model)
    assert 0 < distance < 1e-3
