"""One writer at a time at a URL: a lease, which is a file beside the data that its owner renews.

    STORE/.lease   who writes, a random token, and how often it was renewed

A command that finds a lease watches it for a while. If it changes, its owner lives, and the command ends; if not, the
command takes the lease over. Clocks of different machines are never compared. An owner that was silent for too long
finds another token before it commits anything more, and ends.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dimefm.errors import StoreError
from dimefm.system import storage
from dimefm.system.lock_owner import show_owner, this_process
from dimefm.system.notes import note

_LEASE = ".lease"
_BEAT, _PATIENCE, _LOOK = 10.0, 45.0, 1.0  # seconds between renewals, without one until a takeover, between looks
_held: dict[str, str] = {}  # by the URL of a store: the token under which this process writes to it


@contextmanager
def leasing(store: str) -> Iterator[str]:
    """Hold the store at this URL for the block; gives the token, for `writes_under` in other processes.

    Raises StoreError with the owner's name where another command writes to it, and at the end of the block where
    another has taken over.
    """
    token, done = uuid.uuid4().hex, threading.Event()
    _acquire(store, token)
    renewing = threading.Thread(target=_renew, args=(store, token, done), daemon=True)
    try:
        renewing.start()
        writes_under(store, token)
        yield token
        require_held(store)
    finally:
        done.set()
        renewing.join()
        _held.pop(store, None)
        with suppress(OSError, StoreError):
            if _token(_read(store)) == token:
                storage.remove_file(_place(store))


def writes_under(store: str, token: str | None) -> None:
    """Declare that this process writes under a lease, its own or that of the command that it works for. None for a
    local store, which needs none."""
    if token is not None:
        _held[store] = token


def held() -> dict[str, str]:
    """By the URL of a store, the token under which this process writes to it: what `writes_under` takes."""
    return dict(_held)


def require_held(store: str) -> None:
    """Raises StoreError where this process writes to a store under a lease that another command has taken over. Called
    before any document is written that marks work as done."""
    if store not in _held:
        return
    found = _read(store)
    if _token(found) != _held[store]:
        who = "its lease was deleted" if found is None else f"it is being written by {show_owner(found)}"
        what = f"{store} is no longer this command's: {who}"
        raise StoreError(what, remedy="let one command alone write there, and run it again; what was finished is kept")


def _acquire(store: str, token: str) -> None:
    content = this_process(token=token, renewed=0)
    while not storage.create(_place(store), content):
        before = _read(store)
        if before is None:
            continue
        note(f"{store} has the lease of {show_owner(before)}: watched for a sign of life")
        end = time.monotonic() + _PATIENCE
        while (now := _read(store)) == before and time.monotonic() < end:
            time.sleep(_LOOK)
        if now == before:
            storage.write_atomic(_place(store), content)
            time.sleep(2 * _LOOK)  # if two take over at once, the one that wrote first must see the other's token
            now = _read(store)
            if _token(now) == token:
                return
        if now is not None:
            what = f"{store} is being written by {show_owner(now)}"
            raise StoreError(what, remedy="wait until it has finished, or stop it")


def _renew(store: str, token: str, done: threading.Event) -> None:
    """Renew the lease until `done`, or until another command has it; storage that does not answer is asked again."""
    while not done.wait(_BEAT):
        with suppress(OSError, StoreError):
            content = _read(store)
            if content is None or _token(content) != token:
                return
            facts = json.loads(content)
            storage.write_atomic(_place(store), json.dumps({**facts, "renewed": facts["renewed"] + 1}).encode())


def _place(store: str) -> str:
    return storage.join(store, _LEASE)


def _read(store: str) -> bytes | None:
    """The content of the lease, None where there is none. Raises StoreError where it cannot be read."""
    try:
        return storage.read_bytes(_place(store))
    except FileNotFoundError:
        return None
    except OSError as error:
        what = f"{_place(store)} cannot be read: {error.strerror or error}"
        raise StoreError(what, remedy="look at the access to that place, and run the same command again") from error


def _token(content: bytes | None) -> str | None:
    try:
        return str(json.loads(content or b"{}").get("token"))
    except (ValueError, AttributeError):
        return None
