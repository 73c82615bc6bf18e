"""What this process does of a signal. Each test has a process of its own, since handlers stay."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.system import stopping
from dimefm.system.lock import writing
from dimefm.system.stopping import holding
from tests.processes import FORKING, result_of


def listen(output: Any = lambda: None) -> None:
    """As a command in the foreground does: a shell starts others with Ctrl-C ignored, and so perhaps this test."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopping.listen(output)


def _exit_code(function: Any, *arguments: Any) -> int | None:
    process = FORKING.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_command_that_is_called_in_a_process_changes_none_of_its_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert CliRunner().invoke(cli, ["sets", "cifar10"]).exit_code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def _note_of_a_signal(number: int) -> list[str]:
    listen()
    try:
        with holding(lambda: "outer"), holding(lambda: "inner"):
            signal.raise_signal(number)
    except KeyboardInterrupt as error:
        return [stopping.message(error, signal.Signals(number)), *error.__notes__]
    return []


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_inner_block_says_what_is_kept(number: int, name: str) -> None:
    assert result_of(_note_of_a_signal, number) == [f"Stopped by {name}: inner", "inner"]


def _lost_at_first() -> str:
    listen()

    class Lost:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    try:
        with holding():
            Lost()
            time.sleep(20)
    except KeyboardInterrupt:
        return "came again"
    return "lost"


def test_a_signal_within_what_cannot_raise_comes_again() -> None:
    assert result_of(_lost_at_first) == "came again"


def _within_logging() -> bool:
    listen()
    code = compile("kill(getpid(), 2)", "logging", "exec")
    try:
        with holding():
            logging._acquireLock()  # type: ignore[attr-defined]
            exec(code, {"__name__": "logging", "kill": os.kill, "getpid": os.getpid})
            logging._releaseLock()  # type: ignore[attr-defined]
            time.sleep(20)
    except KeyboardInterrupt:
        return not logging._lock._is_owned()  # type: ignore[attr-defined]
    return False


def test_a_signal_does_not_leave_the_lock_of_logging_taken() -> None:
    assert result_of(_within_logging)


def _ignored() -> bool:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a shell in the background do
    stopping.listen()
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_what_is_ignored_stays_ignored() -> None:
    assert result_of(_ignored)


def _says_and_sleeps(running: Any) -> None:
    running.set()
    time.sleep(60)


def _fork() -> tuple[int | None, Any, str]:
    listen()
    running = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=_says_and_sleeps, args=(running,))
    with holding():
        child.start()
        running.wait(30)
        child.terminate()
        child.join(30)
        time.sleep(0.2)  # nothing comes to this process
        return child.exitcode, signal.getsignal(signal.SIGTERM) is stopping._take, str(stopping._state.number)


def test_a_forked_process_ends_of_its_own_signal_and_its_parent_does_not() -> None:
    assert result_of(_fork) == (-signal.SIGTERM, True, "None")


def _stuck(folder: str, times: int) -> None:
    """Within a call that no signal ends, as of a library."""
    listen()
    stopping._PATIENCE = 0.2 / times
    mutex, c = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    c.pthread_mutex_lock(mutex)
    with writing(folder):
        multiprocessing.get_context("fork").Process(target=_kill, args=(os.getpid(), times), daemon=True).start()
        c.pthread_mutex_lock(mutex)


def _kill(pid: int, times: int) -> None:
    for _ in range(times):
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("times", [1, 2])
def test_a_call_that_does_not_return_is_ended(times: int, tmp_path: Path) -> None:
    assert _exit_code(_stuck, str(tmp_path / "s"), times) == 128 + signal.SIGTERM
    with writing(str(tmp_path / "s")):
        pass  # the lock is free


def _twice() -> None:
    listen()
    with holding():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)


def test_a_second_signal_ends_the_clean_up_with_the_code_of_the_first() -> None:
    assert _exit_code(_twice) == 128 + signal.SIGINT


def test_a_stop_within_code_from_a_string_keeps_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(
        "import os, signal, sys\n"
        "from dimefm.system import stopping\n"
        "stopping.listen()\n"
        "try:\n"
        "    with stopping.holding():\n"
        "        exec('os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(10**7)]')\n"
        "except KeyboardInterrupt:\n"
        "    stopping.leave_no_trace()\n"
        "    sys.exit(143)\n"
    )
    path = os.pathsep.join([str(Path(stopping.__file__).parents[2]), str(tmp_path)])
    command = [sys.executable, "-m", "stopped"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode == 143


def _nothing_held() -> None:
    listen(lambda: "nowhere")
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        os._exit(1)


def test_where_nothing_is_held_it_ends_at_once() -> None:
    assert _exit_code(_nothing_held) == 128 + signal.SIGTERM
