"""`python -m benchmarks NAME [OPTIONS]`, or `make bench ARGS="NAME [OPTIONS]"`."""

from importlib import import_module

import click

from dimefm.system.machine import wait_briefly

# Each command is a function of that name; a module is imported when its command is asked for, so that one command
# needs no libraries of another.
COMMANDS = {
    "gpu": "benchmarks.gpu.command",
    "chaos": "benchmarks.chaos.command",
    **{
        name: f"benchmarks.{name.replace('-', '_')}"
        for name in (
            "preprocessing", "precision", "stage1", "sentences", "tokens", "memory", "plan-scale", "training-pixels",
            "store-reads", "order-reads", "training-loop", "loader-scale", "authors-loop", "objectives",
            "coco-retrieval", "retrieval", "index-choices", "selection", "clip-benchmark", "probe-search", "cpu",
            "sample-recipes", "urls", "architectures", "start-up", "first-session", "probe-few", "latency", "int8",
            "onnx-towers", "index-scale", "retrieve-scale", "select-scale", "remote-training", "verify-scale",
            "checkpoint-cost", "ray-scale", "recipes", "recipe-stores", "second-teacher", "shift", "views",
            "allocator", "explore", "planted-copies", "image-choices",
        )
    },
    "clip-benchmark": "benchmarks.clip_benchmark_agreement",
}  # fmt: skip


class _Lazy(click.Group):
    """Its commands are those of COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        try:
            command: click.Command = getattr(import_module(COMMANDS[cmd_name]), cmd_name.replace("-", "_"))
        except ModuleNotFoundError as error:
            raise click.ClickException(f"{cmd_name} needs {error.name}, which is not installed") from error
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
def benchmarks() -> None:
    """Measure dimefm on this machine. Each command prints a table and the machine that it is of."""


if __name__ == "__main__":
    wait_briefly()  # as the command does for a user
    benchmarks(prog_name="python -m benchmarks")
