"""The command line: the group of all commands, and how an error is shown. The commands are in commands/."""

from __future__ import annotations

import atexit
import errno
import faulthandler
import gc
import os
import sys
from typing import Any

import click

from cache_schemas import SchemaError
from dimefm.commands.caching import cache_images, cache_texts, export_embeddings, import_embeddings
from dimefm.commands.evaluation import compare, evaluate, sets, submission
from dimefm.commands.export import export
from dimefm.commands.help import Commands
from dimefm.commands.inspection import doctor, info, verify
from dimefm.commands.latency import latency
from dimefm.commands.pages import explore, report, watch
from dimefm.commands.prediction import predict
from dimefm.commands.publish import card, push
from dimefm.commands.recipes import recipes
from dimefm.commands.retrieval import build_index, retrieve, search
from dimefm.commands.selection import leaks, select_images, select_texts
from dimefm.commands.training import convert_checkpoint, train_student
from dimefm.errors import DimefmError, StoppedError
from dimefm.system import library_warnings, stopping
from dimefm.system.allocator import keep_freed_memory
from dimefm.system.inert_text import say, text
from dimefm.system.machine import wait_briefly
from dimefm.system.quick_imports import import_quickly
from dimefm.version import __version__


class _Group(Commands):
    """Shows an error that a user can mend as one message and exits with 1. Any other error is a bug and is traced."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except BaseException as error:
            number = stopping.signal_of(error)
            if number is None:
                raise
            shown = stopping.message(error, number)
            if stopping.speaks():
                say(shown, err=True)
            stopping.leave_no_trace()
            ctx.exit(128 + number)  # as a shell reports it

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoppedError as error:
            if stopping.speaks():
                say(f"Stopped: {error}", err=True)
            ctx.exit(128 + error.signal)
        except (DimefmError, SchemaError) as error:
            raise click.ClickException(text(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head` has read enough: click ends without a word
                raise
            raise click.ClickException(_message_for(error)) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's own error; torch may not have been imported
                raise
            what = str(error).partition(" GPU ")[0].strip()  # then come numbers of torch's allocator
            remedy = "give a smaller --batch-size, or --device cpu; nvidia-smi says whether others use the GPU"
            raise click.ClickException(f"a GPU has too little memory: {what}\n  remedy: {remedy}") from error


def _output() -> str | None:
    """The --out of the command that is at work."""
    context = click.get_current_context(silent=True)
    out = context.params.get("out") if context else None
    return out if isinstance(out, str) else None


def _message_for(error: OSError) -> str:
    from dimefm.system.storage import remedy_for

    what, remedy = str(error.strerror or error), remedy_for(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files\n  remedy: raise the limit (ulimit -n 4096), then run the same command again"
    if error.filename:  # a write names none
        what = f"{os.fsdecode(error.filename)}: {what}"
    return text(f"{what}\n  remedy: {remedy}, then run the same command again")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dimefm")
def cli() -> None:
    """Distil a large CLIP into a small student from unpaired images and sentences.

    Stage 1 runs the teacher once and caches its embeddings: cache-images, cache-texts. Then build-index and retrieve
    find the nearest sentences of each image, its pseudo texts, and select-texts the sentences worth training on. Stage
    2, train-student, reads only the caches. Then come evaluate and export.

    Every command can be stopped and run again: it goes on where it was, and does nothing if it had finished.
    """


_NETWORKS = ("cache-images", "cache-texts", "train-student", "evaluate", "predict", "latency")
"""Commands that run a network. The others have large arrays that come and go, and must keep within --memory."""


def main() -> None:
    """Entry point of the `dimefm` command."""
    stopping.listen(_output)
    atexit.register(gc.freeze)  # else all objects of torch are searched for cycles at exit, for a second
    wait_briefly()
    if sys.argv[1:2] and sys.argv[1] in _NETWORKS:
        keep_freed_memory()
    library_warnings.silence()
    import_quickly()
    if sys.stderr is not None:
        faulthandler.enable()  # a crash, of a decoder or as a mapped file is cut short, then says where it was
    cli(prog_name="dimefm")


cli.add_section("Stage 1: cache the teacher's embeddings", cache_images, cache_texts, import_embeddings)
cli.add_section(
    "Find the sentences and images that fit", build_index, retrieve, search, select_texts, select_images, leaks
)
cli.add_section("Stage 2: train a student", train_student, recipes)
cli.add_section("Measure", evaluate, sets, compare, latency, submission)
cli.add_section("Export and convert", export, card, push, convert_checkpoint, export_embeddings)
cli.add_section("Use a student", predict)
cli.add_section("Look and check", info, report, watch, explore, verify, doctor)
