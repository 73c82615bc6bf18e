"""The plan of a selection of images, by which a command knows its own folder: written first, then compared."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cache_schemas.image_selection import ImageSelectionPlan
from cache_schemas.text_selection import PLAN_FILE
from dimefm.store.output_folder import differing, require_only, require_same
from dimefm.system import storage


def begin_or_continue(out: str, plan: ImageSelectionPlan, ours: Collection[str], command: str) -> None:
    """Write the plan of a command, or see that an earlier run of it wrote the same. Raises OutputExistsError where
    `out` holds something else than `ours`."""
    require_only(out, f"a selection of images by {command}", ours)
    path = storage.join(out, PLAN_FILE)
    if not storage.exists(path):
        with storage.writing_to(out):
            storage.write_json(path, plan.to_json())
        return
    own = ImageSelectionPlan.parse(storage.read_json(path), path)
    differences = differing(_facts(own), _facts(plan))
    if own.looked_for and plan.looked_for:  # which name what differs, where `leaks` is their digest
        differences.pop("leaks", None)
        differences |= differing(own.looked_for.facts(), plan.looked_for.facts())
    require_same(out, differences)


def remove_begun(out: str, ours: Collection[str]) -> None:
    """Remove what came to nothing, so that other settings can be tried in the same place."""
    for name in ours:
        place = storage.join(out, name)
        if storage.listing(place):
            storage.remove_folder(place)
        elif storage.exists(place):
            storage.remove_file(place)


def _facts(plan: ImageSelectionPlan) -> dict[str, Any]:
    """All that decides the result, by name. The teacher that encodes `drop_near` is in the identity of the images."""
    facts = {name: getattr(plan, name) for name in ("images_identity", "images_data", "leaks")}
    settings = vars(plan.settings) if plan.settings else {}
    return {**facts, **{name: value for name, value in settings.items() if name != "drop_data"}}
