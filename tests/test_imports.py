"""The houses: who may import whom, and what a training process must not contain."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dimefm.store import Store

ROOT = Path(__file__).parent.parent
STANDARD = sys.stdlib_module_names

# A heavy library has one home; what is listed may import it, nothing else.
HOMES = {
    "ray": {"pipeline/runner.py", "pipeline/index_parts.py"},
    "faiss": {"dimefm/index.py"},
    "zarr": {"dimefm/arrays.py", "dimefm/store.py", "dimefm/mapped.py", "dimefm/pairs.py"},
    "open_clip": {
        "dimefm/clip.py",
        "dimefm/evaluation/definitions.py",
        "dimefm/hub.py",
        "dimefm/initial.py",
        "dimefm/preprocess.py",
        "dimefm/sample/",
        "dimefm/student.py",
        "dimefm/tokenizer.py",
        "dimefm/trained.py",
    },
    "matplotlib": {"dimefm/report.py"},
    "tensorboard": {"dimefm/runlog.py"},
    "sklearn": {"dimefm/evaluation/metrics.py", "dimefm/evaluation/probe.py"},
    "scipy": {"dimefm/evaluation/"},
    "h5py": {"dimefm/evaluation/unpacking.py"},
}
# The two that may name the pipeline: inside the command that needs it.
MAY_IMPORT_PIPELINE = {"dimefm/cli.py", "dimefm/forecast.py"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def test_cache_schemas_need_only_numpy_and_pyarrow() -> None:
    allowed = STANDARD | {"cache_schemas", "numpy", "pyarrow"}
    for path in files("cache_schemas"):
        strangers = {name for name in imports(path) if name.split(".")[0] not in allowed}
        assert not strangers, f"{path.name} imports {strangers}"


def test_dimefm_does_not_import_pipeline() -> None:
    for path in files("dimefm"):
        if path.relative_to(ROOT).as_posix() not in MAY_IMPORT_PIPELINE:
            assert "pipeline" not in {name.split(".")[0] for name in imports(path)}, path.name


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    for package in ("cache_schemas", "dimefm", "pipeline"):
        for path in files(package):
            place = path.relative_to(ROOT).as_posix()
            if not any(place == home or (home.endswith("/") and place.startswith(home)) for home in HOMES[library]):
                assert library not in {name.split(".")[0] for name in imports(path)}, place


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
    assert {"dimefm.train", "dimefm.recipes", "dimefm.validate", "dimefm.evaluation.own_sets"} <= modules
    for name in ("ray", "faiss", "pipeline", "dimefm.clip", "dimefm.index", "sklearn", "scipy", "h5py"):
        assert name not in modules


def test_a_job_that_needs_no_workers_contains_no_ray() -> None:
    modules = loaded_after("import pipeline.importing")
    assert "pipeline.plan" in modules
    assert "ray" not in modules


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    modules = loaded_after("import dimefm.cli")
    for name in ("torch", "ray", "faiss", "zarr", "open_clip", "matplotlib", "sklearn", "scipy", "h5py"):
        assert name not in modules
