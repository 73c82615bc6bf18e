"""What a command that only looks, or that ends with a mistake, imports: no library that takes seconds.

A process that has imported the command line forks a child for each command; the child says which modules it has at the
end. Before the first that may import zarr it imports that once for them all, and it counts for each. Seconds are not
measured here: `python -m benchmarks start-up` does that.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dimefm.cli import cli
from tests.e2e.test_older_formats import unpack_to
from tests.making import make_jpeg
from tests.tiny_onnx import write_onnx

HEAVY = {
    *("torch", "torchvision", "open_clip", "timm", "transformers", "tensorboard", "sklearn", "scipy", "matplotlib"),
    *("ray", "faiss", "h5py", "pandas"),
}
MOST_OF_HELP, MOST = 330, 740
"""Modules that they may import. numpy, pyarrow and zarr, with all that they import, are about 600; with torch it is
1,200, with open_clip 2,800."""

HELP = ("--help", "--version", *(f"{name} --help" for name in cli.commands))
LOOKS = (
    *("sets", "sets cifar10", "sets imagenet1k", "sets --data .", "train-student --fields"),
    *(
        "info images.zarr",
        "info images.zarr --failures",
        "info texts.zarr",
        "info pairs.zarr",
        "info run",
        "info texts.index",
    ),
    *(
        "info texts.selection",
        "verify images.zarr",
        "compare evaluations/student",
        "export-embeddings texts.zarr --out x",
        "export-embeddings texts.zarr --out x.parquet --format parquet --map",
    ),
    "report run --out page.html",
    "select-texts pairs.zarr --out by-hits.selection",
    *("predict onnx photo.jpg --classes cat,dog", "predict onnx photo.jpg --classes cat,dog --json"),
)
_OPENAI = "--out x.zarr --teacher ViT-B-32 --pretrained openai"
_STORES = "--images images.zarr --texts texts.zarr"
MISTAKES = (
    *(
        "cache",
        "info",
        "info nothing",
        "report nothing",
        "report run --out run",
        "watch nothing",
        "watch texts.zarr",
        "verify nothing.zarr",
        "compare nothing",
        "compare evaluations/student --out x.doc",
    ),
    *(
        "sets nothing",
        "sets --data nothing",
        "submission nothing --out x.zip",
        "submission evaluations/student --out x.zip",
    ),
    *(f"cache-images nothing-here {_OPENAI}", f"cache-texts nothing.txt {_OPENAI}"),
    "cache-images inputs/images-0.tar --out run --teacher ViT-B-32 --pretrained openai",
    f"cache-images inputs/images-0.tar {_OPENAI} --workers 1000",
    f"cache-images nothing-here {_OPENAI} --dry-run",
    f"cache-images inputs/images-0.tar {_OPENAI} --view-scale 0.5",
    f"import-embeddings nothing {_OPENAI} --kind image",
    f"import-embeddings embeddings {_OPENAI} --kind image --workers 1000",
    "verify images.zarr --workers 1000",
    *("export-embeddings nothing.zarr --out x", "build-index nothing.zarr --out x.index"),
    *("build-index texts.zarr --out run", "retrieve images.zarr --texts nothing.zarr --out x.zarr"),
    *("retrieve images.zarr --texts images.zarr --out x.zarr", "retrieve images.zarr --texts texts.zarr --out run"),
    "retrieve images.zarr --texts texts.zarr --index nothing.index --out x.zarr",
    "retrieve images.zarr --texts nothing.zarr --out x.zarr --dry-run",
    "retrieve images.zarr --texts texts.zarr --out x.zarr --workers 1000",
    *("search texts.zarr", "search nothing --text x", "search texts.zarr --image nothing.jpg"),
    "search texts.zarr --text x --model onnx",
    *("explore nothing", "explore texts.zarr --model onnx", "explore texts.zarr --teacher ViT-B32"),
    *("select-texts nothing.zarr --out x.selection", "select-texts pairs.zarr --out run"),
    "select-texts pairs.zarr --out x.selection --workers 1",
    "select-texts pairs.zarr --out x.selection --by similarity",
    *("select-images nothing.zarr --out x.selection --size 9", "select-images texts.zarr --out x.selection --size 9"),
    "train-student --images nothing.zarr --texts texts.zarr --out x",
    f"train-student {_STORES} --out x --set nothing=1",
    f"train-student {_STORES} --out x --recipe nothing",
    f"train-student {_STORES} --out x --batch-size 100000",
    f"train-student {_STORES} --out x --batch-size 8 --selection nothing --text-mix selected=1",
    f"train-student {_STORES} --out x --batch-size 8 --val nothing",
    f"train-student {_STORES} --out texts.zarr --batch-size 8",
    *("evaluate run nothing", "evaluate run", "evaluate run --sets nothing --data .", "evaluate run --suite elevater"),
    *("evaluate run --suite elevater --data .", "evaluate run inputs/colours --checkpoint 77"),
    *(
        "export nothing --out x",
        "export run --out x --checkpoint 77",
        "convert-checkpoint nothing.pt --out x --teacher x",
    ),
    *("evaluate nothing inputs/colours", "evaluate onnx inputs/colours --precision fp32"),
    *("predict nothing photo.jpg --classes a,b", "predict run nothing.jpg --classes a,b", "predict run photo.jpg"),
    *("predict run photo.jpg --classes-from nothing.txt", "predict onnx photo.jpg --classes a,b --device cuda"),
    *("card nothing", "card run", "card run --license nothing", "push nothing org/name", "push run x"),
    *("latency nothing", "latency ViT-B-32", "latency run nothing --with-teacher", "latency run --batch 0"),
    *("compare evaluations/student --latency nothing.json", "compare evaluations/student --plot x.png"),
    "cache-texts inputs/sentences.txt --out x.zarr --teacher ViT-B32 --pretrained openai",
    "cache-texts inputs/sentences.txt --out x.zarr --teacher local-dir:nowhere",
    "cache-texts inputs/sentences.txt --out x.zarr --teacher ViT-B-32 --pretrained opnai",
    f"train-student {_STORES} --out x --batch-size 8 --student resnet5",
)

_FORKS = """
import json, os, shlex, sys
import dimefm.cli

for number, (words, may_open) in enumerate(json.load(sys.stdin)):
    if may_open:
        import dimefm.store.embedding_store
    if not os.fork():
        out = os.open(f"{number}.out", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        code = 0
        try:
            dimefm.cli.cli(shlex.split(words), prog_name="dimefm")
        except SystemExit as error:
            code = error.code or 0
        sys.stdout.flush()
        with open(f"{number}.json", "w") as file:
            json.dump([code, sorted(sys.modules)], file)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, set[str], str]]:
    """For each command its exit code, the modules that were imported at its end, and what it printed. They run in a
    folder that an older release wrote."""
    folder = unpack_to(tmp_path_factory.mktemp("cheap"))
    write_onnx(folder / "onnx")
    (folder / "photo.jpg").write_bytes(make_jpeg())
    commands = [*((words, False) for words in HELP), *((words, True) for words in (*LOOKS, *MISTAKES))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", _FORKS], input=json.dumps(commands), text=True, check=True, cwd=folder, env=environment
    )
    results = {}
    for number, (words, _) in enumerate(commands):
        code, modules = json.loads((folder / f"{number}.json").read_text())
        results[words] = code, set(modules), (folder / f"{number}.out").read_text()
    return results


@pytest.mark.parametrize("words", [*HELP, *LOOKS, *MISTAKES])
def test_it_imports_no_library_that_takes_seconds(words: str, found: dict[str, tuple[int, set[str], str]]) -> None:
    code, modules, shown = found[words]
    assert (code != 0) == (words in MISTAKES), shown
    assert "Traceback" not in shown, shown
    assert not modules & HEAVY, shown
    assert len(modules) <= (MOST_OF_HELP if words in HELP else MOST)
