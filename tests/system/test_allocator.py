"""Freed memory is kept in the process, where glibc's defaults would map it anew each time."""

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, threading
from dimefm.system.allocator import keep_freed_memory

keep_freed_memory()

def touch():
    for size in (48, 20, 48, 20):  # MiB: above and below what a heap of a thread can hold
        b"1" * (size * 2**20)

def run():
    touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        touch()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=run) if sys.argv[1] == "thread" else None
thread.start() if thread else run()
"""
_PAGES = 5 * (48 + 20) * 2 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # what is touched after the first round

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"),
    reason="the allocator is not glibc's",
)


_PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}


def _faults(program: str, where: str, **setting: str) -> int:
    words = [sys.executable, "-c", program, where]
    return int(subprocess.run(words, env={**_PLAIN, **setting}, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_used_again_without_page_faults(where: str) -> None:
    assert _faults(_FAULTS, where) < _PAGES // 100


@pytest.mark.parametrize("setting", [{"MALLOC_TOP_PAD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}])
def test_what_the_user_has_set_up_stays(setting: dict[str, str]) -> None:
    assert _faults(_FAULTS, "main", **setting) > _PAGES // 4


def test_processes_that_are_started_inherit_it() -> None:
    bare = _FAULTS.replace("keep_freed_memory()", "")
    parent = f"""
import subprocess, sys
from dimefm.system.allocator import keep_freed_memory

keep_freed_memory()
subprocess.run([sys.executable, "-c", {bare!r}, sys.argv[1]])
"""
    assert _faults(bare, "thread") > _PAGES // 4
    assert _faults(parent, "thread") < _PAGES // 100


@pytest.mark.parametrize(("command", "kept"), [("evaluate", "1"), ("cache-images", "1"), ("build-index", "None")])
def test_commands_that_run_a_network_keep_their_memory(command: str, kept: str) -> None:
    program = f"""
import atexit, os, sys
from dimefm.cli import main

sys.argv[1:] = [{command!r}, "--help"]
atexit.register(lambda: print(os.environ.get("MALLOC_ARENA_MAX")))
main()
"""
    found = subprocess.run([sys.executable, "-c", program], env=_PLAIN, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == kept
