"""Imports of a command's process: what is left out of them, and that it is there again when it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import gc, json, sys
from dimefm.system.quick_imports import import_quickly

import_quickly()
import_quickly()
seen = []
gc.callbacks.append(lambda phase, info: seen.append(phase))
import open_clip
collected = len(seen)
left_out = sorted({"transformers", "wandb"} & sys.modules.keys())
frozen = gc.get_freeze_count()

from cache_schemas.run import TextSpec
from dimefm.models.towers import build_text_student
cfg = {"hf_model_name": sys.argv[1], "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
cfg["hf_proj_type"] = "linear"
tower = build_text_student(TextSpec(name="tiny", text_cfg=cfg, embed_dim=8, activation="gelu"))
is_own = type(tower) is open_clip.model.HFTextEncoder
import torch
shape = list(tower(torch.ones(2, 4, dtype=torch.long)).shape)
print(json.dumps([collected, left_out, frozen > 100_000, gc.isenabled(), is_own, shape]))
"""
_BERT = {
    **{"model_type": "bert", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    **{"intermediate_size": 8, "max_position_embeddings": 8, "pad_token_id": 0},
}


def test_a_command_leaves_out_what_it_does_not_need_and_text_towers_of_hugging_face_find_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(_BERT))
    done = subprocess.run([sys.executable, "-c", _CODE, tmp_path], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    collected, left_out, frozen, enabled, is_own, shape = json.loads(done.stdout)
    assert left_out == []
    assert frozen
    assert enabled
    assert collected < 200  # with the search for cycles it is thousands
    assert is_own
    assert shape == [2, 8]


def test_a_library_that_cannot_do_without_what_is_hidden_is_imported_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dimefm.system import quick_imports

    (tmp_path / "needed_here.py").write_text("")
    (tmp_path / "hard_to_please.py").write_text("import needed_here")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setitem(quick_imports.HIDDEN, "hard_to_please", ("needed_here",))
    quick_imports.import_quickly()
    import hard_to_please  # type: ignore[import-not-found]

    assert hard_to_please.needed_here is sys.modules.pop("needed_here")
    del sys.modules["hard_to_please"]
