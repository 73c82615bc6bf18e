"""A Ray to run on, joined or started for this command alone, and what every job on Ray asks of it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayTaskError

from cache_schemas import SchemaError
from dimefm.errors import DimefmError
from dimefm.system.progress import amount

_OBJECT_STORE_BYTES = 100 * 1024**2  # only shard numbers and commits pass through it
_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who asks for no GPU sees none, whatever the default of this Ray
    "RAY_worker_niceness": "0",  # the default of 15 starves workers on a loaded machine
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def cluster(address: str | None, workers: int, device: str) -> Iterator[None]:
    """A Ray to run on: the cluster at `address`, or a small local one that ends with the block."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with nullcontext() if address else _closed_to_others(), _own_signals():
        if address:
            _join(address)
        else:
            _start(workers, _gpus() if device.startswith("cuda") else 0)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """For the block, Ray leaves SIGTERM to this process: its own handler would end it without a word."""
    utils: Any = ray._private.utils
    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """For the block, a Ray that this process starts listens on 127.0.0.1 alone, and answers only to a token that is
    made here and kept in the environment of its processes. Whoever can talk to a Ray can run code as its user.

    By default Ray listens on all interfaces, takes 127.0.0.1 for the machine's other address, and keeps its token in
    the home folder, for all to read. It has no public setting for the first, and reads the others only once.
    """
    before = {name: os.environ.get(name) for name in _AUTHENTICATION}
    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        _authenticate({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        _authenticate(before)


def _authenticate(environment: Mapping[str, str | None]) -> None:
    """Set the variables that Ray reads for authentication (None: unset them), and have it read them anew."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    inner: Any = ray._raylet
    inner.Config.initialize("")
    inner.AuthenticationTokenLoader.instance().reset_cache()


def _join(address: str) -> None:
    """Join the cluster at `address`. Raises DimefmError where none answers."""
    try:
        _require_answer(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        remedy = "start one with ray start --head, or leave --ray-address out"
        raise DimefmError(f"no Ray cluster answers at {address}: {error}", remedy=remedy) from None


def _start(cpus: int, gpus: int) -> None:
    """Start a small local Ray. Raises DimefmError where it does not start, such as without a folder of its own."""
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # where its node is not up in time, Ray raises just that
        ray.shutdown()
        folder = os.environ.get("RAY_TMPDIR", "/tmp")
        what = f"Ray does not start: {str(error).strip().splitlines()[0]}"
        remedy = f"see {folder}/ray/session_latest/logs, or give --workers 1, which needs no Ray"
        if "AF_UNIX" in what:
            what = f"Ray does not start: its sockets' names would be too long in {folder}"
            remedy = "name a shorter folder: RAY_TMPDIR=/tmp, say; or give --workers 1, which needs no Ray"
        elif isinstance(error, OSError) and error.filename:
            what = f"Ray does not start: {error.filename}: {error.strerror}"
            remedy = "name a folder of your own: RAY_TMPDIR=~/ray, say; or give --workers 1, which needs no Ray"
        raise DimefmError(what, remedy=remedy) from error


def _require_answer(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _gpus() -> int:
    import torch  # workers import this module, and not all need torch

    return torch.cuda.device_count()


def require_room(workers: int, device: str, memory: int = 0) -> int:
    """The CPU cores of the running Ray. Raises DimefmError where it could never place that many workers, each with so
    many bytes of memory."""
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if device.startswith("cuda") and gpus == 0:
        raise DimefmError(
            "--device cuda: Ray has no GPU", remedy="start Ray where there are some, or give --device cpu"
        )
    if workers > cores:
        raise DimefmError(f"{workers} workers need {workers} CPUs, and Ray has {cores}", remedy=f"--workers {cores}")
    if memory:
        fit = sum(int(node["Resources"].get("memory", 0)) // memory for node in ray.nodes() if node["Alive"])
        if workers > fit:
            what = f"{workers} workers need {amount(memory)} of memory each, and Ray has room for {fit}"
            raise DimefmError(what, remedy=f"--workers {fit}" if fit else "give it nodes with more memory")
    return cores


def machines() -> int:
    """How many machines the running Ray has."""
    return sum(node["Alive"] for node in ray.nodes())


def gpu_share(workers: int, device: str) -> float:
    """The GPUs of one worker: one, or a share of one where there are more workers than GPUs, 0 where there is none."""
    gpus = ray.cluster_resources().get("GPU", 0) if device.startswith("cuda") else 0
    if gpus == 0:
        return 0
    return 1 if gpus >= workers else 1 / math.ceil(workers / gpus)


def fetch(reference: Any) -> Any:
    """ray.get, which raises an error that the user can mend as it was, rather than wrapped in Ray's."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, (DimefmError, SchemaError, OSError)):
            raise error.cause from None
        raise
