"""How the processes of one start find each other, where torchrun has started others before.

When torchrun starts all processes again, they get the store of those before, which has addresses of processes that are
gone. So the first process draws a name for each start, and all keys of the start are below that name.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

_EVERY = 0.02  # seconds


def own_store(store: Store, rank: int, world: int, patience: timedelta) -> Store:
    """A part of the store that the `world` processes of this start share, and nobody else.

    Each of the others asks the first for the name of the start, under a key that nobody has used before. What earlier
    ones asked is answered too, and does no harm: the first answers until each of its own start has confirmed. Raises
    TimeoutError, or DistError of torch, if they do not all come.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        _answer(store, name, world, time.monotonic() + patience.total_seconds())
        return PrefixStore(name, store)
    question = uuid.uuid4().hex
    store.set(f"question/{rank}", question)
    store.wait([question], patience)
    name = store.get(question).decode()
    store.set(f"{name}/{rank}", "confirmed")
    return PrefixStore(name, store)


def _answer(store: Store, name: str, world: int, end: float) -> None:
    waiting = set(range(1, world))
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"question/{rank}"]):
                store.set(store.get(f"question/{rank}").decode(), name)
            if store.check([f"{name}/{rank}"]):
                waiting.discard(rank)
        if time.monotonic() > end:
            ranks = ", ".join(map(str, sorted(waiting)))
            raise TimeoutError(f"nothing is heard of rank {ranks}")
        time.sleep(_EVERY if waiting else 0)
