"""What an older dimefm wrote is opened and gone on with by this one.

tests/golden/written_v1.tar.xz was written by commit 4d86e84, the last with all modules in one folder, in
/srv/dimefm-v1, from 24 generated images (the 23rd is no image) and 40 sentences with a random teacher of 16 dimensions:

    cache-images inputs/images-0.tar --out images.zarr --shard-rows 12 --pixels 32 --views 2
    cache-texts inputs/sentences.txt --out texts.zarr --shard-rows 16;  cache-texts inputs/colours --out prompts.zarr
    build-index texts.zarr --out texts.index --queries images.zarr
    retrieve images.zarr --texts texts.zarr --index texts.index --top-k 4 --out pairs.zarr
    select-texts pairs.zarr --out texts.selection --by hits --size 12
    train-student ... --out run (as RUN below; its checkpoint is that of step 2 of 4, with weights that compress well)
    evaluate run inputs/colours --out evaluations --name student --predictions
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cache_schemas import Status, digest_of
from cache_schemas.document import CHECKSUM
from dimefm.caching.add_views import stores_to_write
from dimefm.cli import cli
from dimefm.evaluation.results import read_results
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system import storage
from tests.tiny_training import weights

ARCHIVE = Path(__file__).parents[1] / "golden" / "written_v1.tar.xz"
WRITTEN_IN = "/srv/dimefm-v1"
STORES = ("images.zarr", "texts.zarr", "prompts.zarr")

RUN = (
    "--recipe sample --student test_resnet --image-size 32 --batch-size 4 --texts-per-step 8 --epochs 2 --max-steps 4 "
    "--loss vl=0.7,pvl=0.3 --text-mix retrieved=0.25,selected=0.25,random=0.5 --precision fp32 --workers 0 "
    "--checkpoint-every 2"
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return unpack_to(tmp_path)


def unpack_to(tmp_path: Path) -> Path:
    """The folder that was written, moved to `tmp_path`: documents name each other by absolute paths."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "dimefm-v1"
    for path in (*folder.rglob("*.json"), *folder.rglob("*.jsonl")):
        text = path.read_text(encoding="utf-8")
        if WRITTEN_IN in text:
            text = text.replace(WRITTEN_IN, str(folder))
            if path.suffix == ".json":
                storage.write_json(str(path), _signed(json.loads(text)))
            else:
                lines = [json.dumps(_signed(json.loads(line))) for line in text.splitlines()]
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def _signed(value: Any) -> Any:
    """A document, wherever in it one is, with the checksum of what it now holds."""
    if isinstance(value, dict):
        value = {name: _signed(part) for name, part in value.items()}
        rest = {name: part for name, part in value.items() if name != CHECKSUM}
        return {**value, CHECKSUM: digest_of(rest)} if CHECKSUM in value else value
    return [_signed(part) for part in value] if isinstance(value, list) else value


def dimefm(*words: object) -> str:
    """The output of a command, which must succeed."""
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_artefact_is_described(written: Path) -> None:
    said = {name: dimefm("info", written / name) for name in (*STORES, "pairs.zarr", "texts.selection", "run")}
    assert "OK 23, UNDECODABLE 1" in said["images.zarr"]
    assert "15 of 40 sentences" in said["pairs.zarr"]
    assert "12 of 40 sentences" in said["texts.selection"]
    assert "Flat" in dimefm("info", written / "texts.index")
    assert "022" in dimefm("info", written / "images.zarr", "--failures")


def test_stores_are_verified_and_read(written: Path) -> None:
    for name in STORES:
        dimefm("verify", written / name)
    images = Store(str(written / "images.zarr"))
    assert images.status(0, 24).tolist().count(Status.UNDECODABLE) == 1
    norms = np.linalg.norm(images.read(0, 22).astype(np.float32), axis=1)
    assert np.allclose(norms, 1, atol=1e-2)
    assert Pairs(str(written / "pairs.zarr")).hit_counts().images == 23
    assert len(SelectedTexts(str(written / "texts.selection")).rows()) == 12


def test_views_are_added_to_a_store(written: Path) -> None:
    images = Store(str(written / "images.zarr"))
    before, plan = files_of(written / "images.zarr"), images.schema.views
    assert plan is not None
    _, added = stores_to_write(images, replace(plan, count=3))
    for shard in range(2):
        arrays = images.shard_arrays(shard)
        first = {
            name: arrays[name][:, :1] if name in ("embedding", "view") else arrays[name]
            for name in added.schema.arrays()
        }
        added.write_shard(shard, first, list(images.failures_in(shard).values()), device="cpu", seconds=0.0)
    grown = Store(images.path)
    assert grown.schema.views == replace(plan, count=3)
    assert grown.schema.identity != images.schema.identity
    np.testing.assert_array_equal(grown.embeddings(np.arange(24))[:, 2], images.embeddings(np.arange(24))[:, 0])
    dimefm("verify", written / "images.zarr")
    after = files_of(written / "images.zarr")
    assert {name: data for name, data in after.items() if not name.startswith("views/")} == before


def test_a_finished_command_has_nothing_to_do(written: Path) -> None:
    """And so changes not one byte of what is there."""
    commands = {
        "texts.index": ("build-index", written / "texts.zarr", "--queries", written / "images.zarr"),
        "pairs.zarr": (
            *("retrieve", written / "images.zarr", "--texts", written / "texts.zarr", "--top-k", 4),
            *("--index", written / "texts.index"),
        ),
        "texts.selection": ("select-texts", written / "pairs.zarr", "--by", "hits", "--size", 12),
    }
    for name, words in commands.items():
        before = files_of(written / name)
        dimefm(*words, "--out", written / name)
        assert files_of(written / name) == before, name


def test_a_new_search_of_old_stores_finds_the_same(written: Path) -> None:
    words = ("retrieve", written / "images.zarr", "--texts", written / "texts.zarr", "--top-k", 4, "--device", "cpu")
    dimefm(*words, "--out", written / "again.zarr")
    old, new = Pairs(str(written / "pairs.zarr")), Pairs(str(written / "again.zarr"))
    assert np.allclose(old.scores(0, 24), new.scores(0, 24), atol=2e-3, equal_nan=True)


def test_a_run_goes_on_from_its_checkpoint(written: Path) -> None:
    paths = {"--images": "images.zarr", "--texts": "texts.zarr", "--pairs": "pairs.zarr", "--out": "run"}
    paths |= {"--selection": "texts.selection", "--val": "inputs/colours", "--val-texts": "prompts.zarr"}
    words = [word for option, name in paths.items() for word in (option, str(written / name))]
    then = "--lr 0.008 --optimizer adamw --set warmup_epochs=0.6 --set val_every=3"  # as the recipe was
    assert "4 steps done" in dimefm("train-student", *words, *RUN.split(), *then.split())
    assert sorted(path.name for path in (written / "run" / "checkpoints").glob("*.pt")) == [
        "step-00000002.pt",
        "step-00000004.pt",
    ]
    assert all(value.isfinite().all() for value in weights(written / "run").values())


def test_results_are_compared(written: Path) -> None:
    (result,) = read_results(str(written / "evaluations" / "student"))
    assert (result.set, result.value) == ("colours", 0.0)
    assert "colours" in dimefm("compare", written / "evaluations" / "student")
    kept = json.loads((written / "run" / "run.json").read_text())
    assert kept["schema"] == "dimefm.run"
