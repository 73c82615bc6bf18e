"""How fast a student of the sample is in each way of running it, beside its teacher.

Without --run a student of the recipe `sample` is trained for one step: speed does not depend on what it has learned,
and the recipe `sample-paper` has the same towers. `make reproduce` leaves trained ones, runs/sample/run-best and
runs/sample/run-paper.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.chaos.jobs import make_inputs
from dimefm.sample import sample_dir

_TEACHER = f"--teacher local-dir:{sample_dir() / 'teacher'}"
_TRAINED = (
    f"cache-images images --out images.zarr {_TEACHER}",
    f"cache-texts texts.txt --out texts.zarr {_TEACHER}",
    "train-student --images images.zarr --texts texts.zarr --out student --recipe sample --batch-size 8 --max-steps 1",
)


@click.command()
@click.option("--run", "runs", multiple=True, type=click.Path(exists=True), help="Trained run. May be repeated.")
@click.option("--batch", default="1,64", show_default=True)
@click.option("--threads", help="Default: one per core.")
@click.option("--seconds", default=0.5, show_default=True, help="Of measuring each model, tower and batch.")
@click.option("--compiled/--not-compiled", default=True, help="torch.compile takes a good part of the time.")
@click.option("--out", type=click.Path(dir_okay=False), help="File of dimefm latency to add to.")
def latency(
    runs: tuple[str, ...], batch: str, threads: str | None, seconds: float, compiled: bool, out: str | None
) -> None:
    """PyTorch, torch.compile, ONNX and int8 side by side, and the teacher."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not runs:
            make_inputs(folder, images=64, sentences=500, labelled=30)
            for words in _TRAINED:
                _dimefm(words, folder)
        models = []
        for run in (Path(one).resolve() for one in runs or (folder / "student",)):
            onnx, int8 = (f"{run.name}-{way}" for way in ("onnx", "int8"))
            _dimefm(f"export {run} --format onnx --out {onnx} --check-on {sample_dir() / 'eval' / 'cifar10'}", folder)
            _dimefm(f"export {run} --format onnx --int8 --accept --out {int8} "
                    f"--check-on {sample_dir() / 'eval' / 'cifar10'}", folder)  # fmt: skip
            models += [str(run), onnx, int8]
        how = f"--with-teacher --batch {batch} --seconds {seconds}" + (f" --threads {threads}" if threads else "")
        words = f"latency {shlex.join(models)} {how} --out {Path(out).resolve() if out else 'latency.json'}"
        _dimefm(words + " --compiled" * compiled, folder, shown=True)


def _dimefm(words: str, folder: Path, *, shown: bool = False) -> None:
    """Run a command in the folder. Raises CalledProcessError where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "dimefm", *shlex.split(words), *([] if shown else ["--quiet"])]
    click.echo(f"$ dimefm {words}", err=True)
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=None if shown else subprocess.DEVNULL)
