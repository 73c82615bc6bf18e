"""What a dry run of stage 1 prints: rows, shards, bytes and hours, and the teacher."""

from __future__ import annotations

import torch

from cache_schemas import ViewPlan, to_plain
from dimefm.caching.plan import Forecast, what_limit_left
from dimefm.caching.speed import Rates
from dimefm.models.teacher_rows import teacher_rows
from dimefm.sources.account import describe_skipped, first_lines
from dimefm.system.inert_text import line
from dimefm.system.machine import cpus
from dimefm.system.progress import amount, duration
from dimefm.system.wording import counted, hanging, rate
from pipeline.workers import START_SECONDS

_LIBRARIES = 5.0  # seconds that the command's own process takes to import them, about


def show_forecast(
    found: Forecast,
    rates: Rates,
    *,
    device: str,
    workers: int,
    threads: int | None,
    remote: bool,
    load: float,
    captions_out: str = "",
    caption_seconds: float = 0.0,
) -> str:
    """A line or more for each fact, a name and words. `workers` is their number, on a cluster if `remote`,
    with `threads` decoding threads each, or as many as `rates` show to be of use; `load` is the seconds that the
    teacher took to load, `caption_seconds` what one takes for the captions."""
    schema, source, kind, on_cpu = found.schema, found.schema.source, found.schema.kind, device == "cpu"
    workers = min(workers, schema.shards)
    # Several workers on one GPU are no faster than it; there are no more workers than cores.
    devices = workers if on_cpu or remote else min(workers, torch.cuda.device_count())
    threads = threads or rates.threads(max(1, cpus() // workers))
    speed = devices * rates.of_worker(threads * workers // devices, shared=on_cpu)
    who = counted(workers, "worker")
    measured = f"{rate(rates.teacher, 1, kind)} by the teacher on one {'core' if on_cpu else 'GPU'}"
    if kind == "image":
        measured = f"{rate(rates.load, 1, kind)} read and decoded by a thread, {measured}"
        who += f" of {counted(threads, 'decoding thread')}"
    on_ray = remote or workers > 1
    start = _LIBRARIES + load + (START_SECONDS + load if on_ray else 0)
    jpegs = f" and {amount(schema.rows * rates.jpeg_bytes)} of JPEGs" if rates.jpeg_bytes else ""
    rows = [
        ("rows", f"{schema.rows:,} from {counted(source.files, 'file')}, {amount(source.bytes)} to read"),
        ("shards", f"{schema.shards:,}"),
        ("writes", f"{amount(found.bytes_out)} of embeddings and status{jpegs}"),
        *_added(schema.views),
        ("measured", measured),
        ("takes", f"{duration(schema.rows / speed)} at {rate(speed, 1, kind)} with {who}"),
        ("start-up", f"about {duration(start)} before that{', Ray and its workers with it' if on_ray else ''}"),
    ]
    if captions_out:
        words = f"{found.captions:,}, which {captions_out} gets after the images, each once"
        rows.append(("captions", f"{words}: about {duration(caption_seconds)} of the teacher"))
    decodes = kind == "image" and schema.decoder != "nvjpeg"
    if decodes and not on_cpu and (bound := rates.bottleneck(threads)):
        rows.append(("", bound))
    if unread := what_limit_left(schema):
        rows.append(("limit", unread.removeprefix("limit: ")))
    rows += [("skipped", describe_skipped(one)) for one in source.skipped]
    rows += [("problem", problem) for problem in first_lines(source.problems)]
    if rates.failed:
        rows.append(("failed", rates.failed))
    rows += teacher_rows(to_plain(schema.teacher))
    width = max(len(name) for name, _ in rows)
    return "\n".join(hanging(f"{name:<{width}}  ", line(words)) for name, words in rows)


def _added(views: ViewPlan | None) -> list[tuple[str, str]]:
    if views is None or not views.first:
        return []
    return [("views", f"{counted(views.count, 'view')} of each image added to the {views.first} that are there")]
