"""One writer at a time at a URL: a lease, which is a chain of small files beside the data.

    STORE/.lease                the first writer
    STORE/.lease-after-DIGEST   who has taken over from the lease that has this sha256
    STORE/.lease-beat-DIGEST    how often the owner has renewed the lease that has this sha256

The last of the chain owns the store. A file of the chain is written once, on condition that there is none
(If-None-Match: *), so that one succeeds of many that start, or take over, at once; and no file of one command is ever
written by another, so that a command that was stopped for an hour cannot take back what it has lost.

A command that finds a lease watches it for a while. If it changes, its owner lives, and the command ends; if not, the
command takes over. Clocks of different machines are never compared. An owner that was silent for too long finds that
another has followed it before it commits anything more, and ends. docs/cluster.md says what that guarantees.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dimefm.errors import StoreError
from dimefm.system import storage
from dimefm.system.lock_owner import show_owner, this_process
from dimefm.system.notes import note

_LEASE, _AFTER, _BEATS = ".lease", ".lease-after-", ".lease-beat-"
_BEAT, _PATIENCE, _LOOK = 10.0, 45.0, 1.0  # seconds between renewals, without one until a takeover, between looks
_held: dict[str, str] = {}  # by the URL of a store: the digest of the lease under which this process writes to it


@contextmanager
def leasing(store: str) -> Iterator[str]:
    """Hold the store at this URL for the block; gives the lease's digest, for `writes_under` in other processes.

    Raises StoreError with the owner's name where another command writes to it, and at the end of the block where
    another has taken over.
    """
    content, done = this_process(token=uuid.uuid4().hex), threading.Event()
    lease = _digest(content)
    renewing = threading.Thread(target=_renew, args=(store, lease, done), daemon=True)
    try:
        _acquire(store, content)
        renewing.start()
        writes_under(store, lease)
        yield lease
        require_held(store)
    finally:
        done.set()
        if renewing.ident:
            renewing.join()
        _held.pop(store, None)
        with suppress(OSError, StoreError):
            _release(store, lease)


def writes_under(store: str, lease: str | None) -> None:
    """Declare that this process writes under a lease, its own or that of the command that it works for. None for a
    local store, which needs none."""
    if lease is not None:
        _held[store] = lease


def held() -> dict[str, str]:
    """By the URL of a store, the lease under which this process writes to it, as `writes_under` takes it."""
    return dict(_held)


def require_held(store: str) -> None:
    """Raises StoreError where this process writes to a store under a lease that another command has taken over. Called
    before any document is written that marks work as done. The lease of a store covers all that lies in it."""
    store = next((one for one in _held if f"{store}/".startswith(f"{one}/")), store)
    if store not in _held:
        return
    chain = _chain(store)
    if not chain or _digest(chain[-1]) != _held[store]:
        who = f"it is being written by {show_owner(chain[-1])}" if chain else "its lease was deleted"
        what = f"{store} is no longer this command's: {who}"
        raise StoreError(what, remedy="let one command alone write there, and run it again; what was finished is kept")


def _acquire(store: str, content: bytes) -> None:
    place = storage.join(store, _LEASE)
    while not storage.create(place, content):
        before = _signs(store)
        if before is None:
            continue
        owner, _ = before
        note(f"{store} has the lease of {show_owner(owner)}: watched for a sign of life")
        end = time.monotonic() + _PATIENCE
        while (now := _signs(store)) == before and time.monotonic() < end:
            time.sleep(_LOOK)
        if now == before and storage.create(storage.join(store, f"{_AFTER}{_digest(owner)}"), content):
            break
        if (chain := _chain(store)) and chain[-1] != content:
            raise _written(store, chain[-1])
    if not storage.refuses_second(storage.join(store, f"{_BEATS}{_digest(content)}"), b"0"):
        note(f"{store}: this storage writes a file that is there without a word; start one command at a time on it")
        time.sleep(2 * _LOOK)  # if two begin at once, the one that wrote first must see the other's lease
        if (chain := _chain(store)) and chain[-1] != content:
            raise _written(store, chain[-1])


def _written(store: str, owner: bytes) -> StoreError:
    what = f"{store} is being written by {show_owner(owner)}"
    return StoreError(what, remedy="wait until it has finished, or stop it")


def _renew(store: str, lease: str, done: threading.Event) -> None:
    """Renew the lease until `done`; storage that does not answer is asked again."""
    beats = 0
    while not done.wait(_BEAT):
        beats += 1
        with suppress(OSError, StoreError):
            storage.write_atomic(storage.join(store, f"{_BEATS}{lease}"), str(beats).encode())


def _release(store: str, lease: str) -> None:
    """Remove the files of the chain if `lease` is its last, the first of them first: then the store is free. Else only
    what is left of this lease's own."""
    chain = [_digest(content) for content in _chain(store)]
    own = [f"{_BEATS}{lease}"]
    if chain and chain[-1] == lease:
        own = [_LEASE, *(f"{_AFTER}{one}" for one in chain[:-1]), *(f"{_BEATS}{one}" for one in chain)]
    for name in own:
        storage.remove_file(storage.join(store, name))


def _signs(store: str) -> tuple[bytes, bytes | None] | None:
    """The lease of the owner, and the last sign of its life; None where nobody owns the store."""
    chain = _chain(store)
    return (chain[-1], _read(store, f"{_BEATS}{_digest(chain[-1])}")) if chain else None


def _chain(store: str) -> list[bytes]:
    """The leases, from the first to that of the owner."""
    chain, name = list[bytes](), _LEASE
    while (content := _read(store, name)) is not None:
        chain.append(content)
        name = f"{_AFTER}{_digest(content)}"
    return chain


def _read(store: str, name: str) -> bytes | None:
    """A file of the lease, None where there is none. Raises StoreError where it cannot be read."""
    place = storage.join(store, name)
    try:
        return storage.read_bytes(place)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = f"{place} cannot be read: {error.strerror or error}"
        raise StoreError(what, remedy="look at the access to that place, and run the same command again") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
