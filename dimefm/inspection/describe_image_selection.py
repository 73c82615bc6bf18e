"""What `info` knows of a selection of images, and of leaks."""

from __future__ import annotations

from typing import Any

from cache_schemas.document import to_plain
from cache_schemas.image_selection import ImageSelectionPlan
from cache_schemas.leaks import LEAKS_FILE, Leaks
from cache_schemas.text_selection import PLAN_FILE, REPORT_FILE, SELECTION_FILE
from dimefm.inspection.description import Description, Rows
from dimefm.selection.image_report import describe_image_settings
from dimefm.store.leaked_rows import read_leaks, unreadable_images
from dimefm.store.selected_images import SelectedImages
from dimefm.system import storage
from dimefm.system.wording import counted

_SHOWN = 12


def describe_image_selection(path: str) -> Description:
    """A selection, finished or not."""
    title = f"{storage.absolute(path)}: selected images"
    if not storage.exists(storage.join(path, SELECTION_FILE)):
        where = storage.join(path, PLAN_FILE)
        plan = ImageSelectionPlan.parse(storage.read_json(where), where)
        facts = {"artefact": "image selection", "path": storage.absolute(path), "finished": False,
                 "settings": to_plain(plan.settings), "images_store": plan.images}  # fmt: skip
        return Description(f"{title}, unfinished", facts, [("images store", plan.images)])
    found = SelectedImages(path).document
    leaks = read_leaks(path) if storage.exists(storage.join(path, LEAKS_FILE)) else None
    facts = {
        "artefact": "image selection",
        "path": storage.absolute(path),
        "finished": True,
        "rows": found.rows,
        "kept": found.kept,
        "how": describe_image_settings(found),
        "settings": to_plain(found.plan.settings),
        "left_out": [{"reason": reason, "images": count} for reason, count in found.dropped.items()],
        "groups": found.groups,
        "clusters": found.clusters,
        "cap": found.cap,
        "sources": to_plain(sorted(found.sources, key=lambda source: (-source.kept, source.file))),
        "images_store": found.plan.images,
        "report": storage.join(storage.absolute(path), REPORT_FILE),
        "leaks": to_plain(leaks.sets) if leaks else None,
    }
    return Description(title, facts, _rows(facts, leaks))


def describe_text_leaks(path: str) -> Description:
    """Leaks of a text store."""
    found = read_leaks(path)
    facts = {
        "artefact": "leaks",
        "path": storage.absolute(path),
        "finished": True,
        "kind": found.kind,
        "store": found.store,
        "rows": found.rows,
        "cosine": found.cosine,
        "similarity": found.similarity,
        "nearest": found.nearest,
        "sets": to_plain(found.sets),
    }
    rows = [("leaks", f"{one.leaked:,} of {counted(one.tested, 'caption')} of {one.title}") for one in found.sets]
    rows += [
        ("rows", f"{counted(found.rows, 'sentence')} of the store; select-texts --without leaves them out"),
        ("looked for", f"a cosine of {found.cosine:g} or more, {found.similarity:g} or more of the words in common"),
        ("texts store", found.store),
    ]
    return Description(f"{storage.absolute(path)}: leaks", facts, rows)


def _rows(facts: dict[str, Any], leaks: Leaks | None) -> Rows:
    sources, groups = facts["sources"], facts["groups"]
    rows = [
        ("kept", f"{facts['kept']:,} of {facts['rows']:,} images, {facts['kept'] / facts['rows']:.1%}"),
        ("how", facts["how"]),
        *(("left out", f"{one['images']:,}: {one['reason']}") for one in facts["left_out"]),
    ]
    for one in leaks.sets if leaks else ():
        rows.append(("leaks", f"{one.leaked:,} of {counted(one.tested, 'image')} of {one.title}"))
    rows += [("not tested", text) for text in (unreadable_images(leaks) if leaks else ())]
    if groups.keys() - {"1"}:
        rows.append(("stand for", ", ".join(f"{size}: {count:,}" for size, count in groups.items())))
    rows += [
        ("of", f"{s['file'] or '(no file)'}: {s['kept']:,} of {s['rows']:,}, {s['kept'] / s['rows']:.1%}")
        for s in sources[:_SHOWN]
    ]
    rows += [("", f"and {counted(len(sources) - _SHOWN, 'more source')}")] if len(sources) > _SHOWN else []
    return [*rows, ("images store", facts["images_store"]), ("read more", facts["report"])]
