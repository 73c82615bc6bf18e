"""`python -m benchmarks NAME [OPTIONS]`, or `make bench ARGS="NAME [OPTIONS]"`."""

import click

from benchmarks.authors_loop import authors_loop
from benchmarks.clip_benchmark_agreement import clip_benchmark
from benchmarks.coco_retrieval import coco_retrieval
from benchmarks.cpu import cpu
from benchmarks.index_choices import index_choices
from benchmarks.loader_scale import loader_scale
from benchmarks.memory import memory
from benchmarks.objectives import objectives
from benchmarks.plan_scale import plan_scale
from benchmarks.precision import precision
from benchmarks.preprocessing import preprocessing
from benchmarks.probe_search import probe_search
from benchmarks.retrieval import retrieval
from benchmarks.sample_recipes import sample_recipes
from benchmarks.selection import selection
from benchmarks.sentences import sentences
from benchmarks.stage1 import stage1
from benchmarks.store_reads import store_reads
from benchmarks.training_loop import training_loop
from benchmarks.training_pixels import training_pixels


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def benchmarks() -> None:
    """Measure dimefm on this machine. Each command prints a table and the machine that it is of."""


for command in (
    preprocessing, precision, stage1, sentences, memory, plan_scale, training_pixels, store_reads,
    training_loop, loader_scale, authors_loop, objectives, coco_retrieval, retrieval, index_choices, selection,
    clip_benchmark, probe_search, cpu,
    sample_recipes,
):  # fmt: skip
    benchmarks.add_command(command)

if __name__ == "__main__":
    benchmarks(prog_name="python -m benchmarks")
