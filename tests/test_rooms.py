"""The rooms: who may import whom, and what a process must not contain."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dimefm
from dimefm.store.embedding_store import Store

ROOT = Path(__file__).parents[1]

# From the ground up. A room may use the ground, and of the rooms above it in this list those that it names: so arrows
# go one way, and there is no circle. The same list, as a table for readers, is in ARCHITECTURE.md.
GROUND = ("cache_schemas", "dimefm.errors", "dimefm.version")
ROOMS = {
    "dimefm.system": "",
    "dimefm.images": "system",
    "dimefm.sources": "images system",
    "dimefm.store": "system",
    "dimefm.models": "images system",
    "dimefm.caching": "images models sources store system",
    "dimefm.retrieval": "images models store system",
    "dimefm.sample": "images sources",
    "dimefm.selection": "images sources store system",
    "dimefm.datasets": "images sources system",
    "dimefm.exchange": "caching images models selection sources store system",
    "dimefm.training": "datasets images models sources store system",
    "dimefm.evaluation": "caching datasets models store system training",
    "dimefm.latency": "evaluation models system training",
    "dimefm.export": "datasets evaluation images latency models sample sources store system training",
    "dimefm.leaks": "datasets evaluation images retrieval selection sources store system",
    "dimefm.inspection": "caching datasets evaluation exchange latency models retrieval selection sources store system "
    "training",
    "dimefm.pages": "caching datasets evaluation inspection latency retrieval selection sources store system training",
    "dimefm.prediction": "evaluation images models sources system",
    "pipeline": "caching models sources store system",
    "dimefm.commands": "*",
    "dimefm.cli": "commands system",
    "dimefm.__main__": "cli system",
    "dimefm.reproduce": "caching cli evaluation latency pages sample store system training",
    "dimefm": "*",  # the public face
}

# A heavy library has few homes. What is listed may import it, nothing else.
HOMES = {
    "ray": {f"pipeline/ray_{name}.py" for name in ("cluster", "losses", "shards", "workers")},
    "faiss": {"dimefm/retrieval/faiss_index.py", "dimefm/retrieval/index_merge.py"},
    "zarr": {"dimefm/store/"},
    "open_clip": {"dimefm/models/", "dimefm/images/preprocess.py", "dimefm/datasets/definitions.py", "dimefm/sample/"},
    "jinja2": {"dimefm/pages/page.py"},
    "matplotlib": {"dimefm/latency/plot.py", "dimefm/reproduce/report.py"},
    "tensorboard": {"dimefm/training/run_log.py"},
    "sklearn": {"dimefm/evaluation/metrics.py", "dimefm/evaluation/probe.py"},
    "scipy": {"dimefm/evaluation/", "dimefm/datasets/published_layouts.py"},
    "h5py": {"dimefm/datasets/raw_arrays.py"},
    "trackio": {"dimefm/training/tracker.py"},
    "wandb": {"dimefm/training/tracker.py"},
}


@cache
def names(path: Path) -> list[str]:
    """Every module that a file imports, wherever in it, and every name it takes from one."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: name the room, as every other import does"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def room_of(name: str) -> str | None:
    """The room, or the part of the ground, that a module is in; None for what is not ours."""
    within = [place for place in (*ROOMS, *GROUND) if name == place or name.startswith(f"{place}.")]
    return max(within, key=len, default=None)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows() -> dict[tuple[str, str], set[str]]:
    """From room to room, and the files in which that is."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in (path for package in ("cache_schemas", "dimefm", "pipeline") for path in files(package)):
        here = room_of(module_of(path))
        assert here is not None
        for name in names(path):
            there = room_of(name)
            if there is not None and there != here:
                found.setdefault((here, there), set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_a_room_uses_only_what_its_line_names() -> None:
    for (here, there), where in arrows().items():
        if here in GROUND or there in GROUND:
            continue
        allowed = ROOMS[here].split()
        assert "*" in allowed or there.removeprefix("dimefm.") in allowed, f"{here} uses {there}: {sorted(where)}"


def test_every_word_of_a_line_is_used() -> None:
    used = arrows()
    for here, words in ROOMS.items():
        for word in words.split():
            there = word if word == "pipeline" else f"dimefm.{word}"
            assert word == "*" or (here, there) in used, f"{here} does not use {word}: take it out of its line"


def test_the_table_for_readers_is_the_same() -> None:
    """In ARCHITECTURE.md: the same rooms in the same order, with the same words."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \|(.*)\|$", text, re.MULTILINE)
    everything = {"all, when it runs": "*", "all, when asked": "*"}
    assert {room: everything.get(uses.strip(), uses.replace(",", "").strip()) for room, uses in rows} == ROOMS
    assert [room for room, _ in rows] == list(ROOMS)


def test_the_arrows_go_one_way() -> None:
    order = list(ROOMS)
    for here, there in arrows():
        if here in ROOMS and there in ROOMS:
            assert order.index(there) < order.index(here), f"{here} uses {there}, which stands after it"


def test_the_ground_uses_no_room() -> None:
    for (here, there), where in arrows().items():
        if here in GROUND:
            assert there == "cache_schemas", f"{sorted(where)} uses {there}"


def test_cache_schemas_need_only_numpy_and_pyarrow() -> None:
    allowed = sys.stdlib_module_names | {"cache_schemas", "numpy", "pyarrow"}
    for path in files("cache_schemas"):
        strangers = {name for name in names(path) if name.split(".")[0] not in allowed}
        assert not strangers, f"{path.name} imports {strangers}"


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_few_homes(library: str) -> None:
    for package in ("cache_schemas", "dimefm", "pipeline"):
        for path in files(package):
            place = path.relative_to(ROOT).as_posix()
            if not any(place == home or (home.endswith("/") and place.startswith(home)) for home in HOMES[library]):
                assert library not in {name.split(".")[0] for name in names(path)}, place


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(chr(10).join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_whole_training_run_contains_no_ray_no_faiss_and_no_teacher(
    tmp_path: Path, tiny_run: list[str], cifar10: str, prompt_store: Store
) -> None:
    words = ["--out", str(tmp_path / "run"), "--max-steps", "1", "--val", cifar10, "--val-texts", prompt_store.path]
    statement = f"from dimefm.cli import cli\ncli({[*tiny_run, *words]!r}, standalone_mode=False)\n"
    modules = loaded_after(statement)
    own = {"dimefm.training.train", "dimefm.training.recipes", "dimefm.training.validation", "dimefm.datasets.own_sets"}
    assert own <= modules
    rooms = {f"dimefm.{name}" for name in ("retrieval", "selection", "caching")}
    for name in ("ray", "faiss", "pipeline", "dimefm.models.clip", *sorted(rooms), "sklearn", "scipy", "h5py"):
        assert name not in modules


def test_a_job_that_needs_no_workers_contains_no_ray() -> None:
    modules = loaded_after("import dimefm.exchange.import_embeddings")
    assert "dimefm.caching.plan" in modules
    assert "ray" not in modules


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    modules = loaded_after("import dimefm.cli")
    for name in ("torch", "ray", "faiss", "zarr", "open_clip", "matplotlib", "sklearn", "scipy", "h5py"):
        assert name not in modules


def test_the_public_face_loads_what_is_asked_for_and_no_more() -> None:
    """Every name of it, and nothing before one is asked for."""
    assert not {name for name in loaded_after("import dimefm") if name.startswith("dimefm.")} - {"dimefm.version"}
    modules = loaded_after("from dimefm import TrainConfig, CacheConfig")
    assert {"dimefm.training.config", "pipeline.cache"} <= modules
    assert "ray" not in modules
    for name in dimefm.__all__:
        assert getattr(dimefm, name) is not None
    assert set(dimefm.__all__) - {"__version__"} == set(dimefm._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dimefm.nothing  # noqa: B018
