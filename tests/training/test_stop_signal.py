"""What a training process does of the signals that it is sent."""

import ctypes
import multiprocessing
import os
import signal
import time

from dimefm.system import stopping
from dimefm.training.stop_signal import StopSignal
from tests.processes import FORKING, result_of


def _signalled_twice(torchrun: bool) -> str:
    """Two signals come within a step, which is a long call of a library; as where torchrun and Slurm send one each."""
    if torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
    stopping.listen()
    stopping._PATIENCE = 0.1
    mutex, c = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    c.pthread_mutex_lock(mutex)
    try:
        with stopping.holding(), StopSignal() as stop:
            multiprocessing.get_context("fork").Process(target=_kill_twice, args=(os.getpid(),), daemon=True).start()
            c.pthread_mutex_timedlock(mutex, (ctypes.c_long * 2)(int(time.time()) + 2, 0))
            time.sleep(0.3)
            return f"stops after the step, for {stop.received and stop.received.name}"
    except KeyboardInterrupt:
        return "stops at once"


def _kill_twice(pid: int) -> None:
    for _ in range(2):
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)


def test_torchrun_and_slurm_may_both_send_a_signal() -> None:
    assert result_of(_signalled_twice, True) == "stops after the step, for SIGTERM"


def test_a_second_signal_ends_a_process_without_torchrun() -> None:
    process = FORKING.Process(target=_signalled_twice, args=(False,))
    process.start()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
