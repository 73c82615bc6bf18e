"""What `dimefm sets` prints: the known sets as a list, or one of them in full."""

from __future__ import annotations

from collections.abc import Sequence

from cache_schemas.evaluation import SetDefinition
from dimefm.system.wording import hanging


def describe_sets(definitions: Sequence[SetDefinition], folders: dict[str, str]) -> str:
    """One line per set, with the folder in which it was found (`folders`, by name); a single set is shown in full."""
    if len(definitions) == 1:
        return _in_full(definitions[0], folders)
    lines = [f"{'set':<17} {'suite':<11} {'classes':>7} {'test images':>11}  metric"]
    for d in definitions:
        found = f"  {folders[d.name]}" if d.name in folders else ""
        lines.append(f"{d.name:<17} {d.suite:<11} {d.class_count or '':>7} {d.splits['test']:>11,}  {d.metric}{found}")
    return "\n".join(lines)


def _in_full(definition: SetDefinition, folders: dict[str, str]) -> str:
    d = definition
    templates = "; ".join(d.templates[:3]) + (" ..." if len(d.templates) > 3 else "")
    facts = {
        "suite": d.suite,
        "task": d.task,
        "metric": d.metric,
        "classes": str(d.class_count or ""),
        "images": ", ".join(f"{split} {count:,}" for split, count in d.splits.items()),
        "resize": d.resize,
        "licence": d.licence,
        "get it from": d.get,
        "layouts": ", ".join(d.layouts),
        "its folder": ", ".join((d.name, *d.aliases)),
        "templates": templates or ("ImageNet's, by OpenAI" if d.templates_from else ""),
        **{f"source of {name}": text for name, text in d.sources.items()},
    }
    if folders:
        facts["found"] = folders.get(d.name, "no")
    return "\n".join([d.title, *(hanging(f"  {name:<20} ", text) for name, text in facts.items() if text)])
