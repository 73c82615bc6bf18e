"""CLIP_benchmark's own command in an environment of its own: `PYTHON clip_benchmark_worker.py JOB`, JOB being a `Job`
as JSON. Each set's metrics are written to OUT/SET.json, as CLIP_benchmark does; with `keep` the scores to OUT/SET.npz.

Shapes: N images, C classes, M captions.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RETRIEVAL = "retrieval"  # in a dataset_type.txt


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: names of the sets below `data` in CLIP_benchmark's WebDataset layout, and a model by open_clip's
    name and tag (empty for a local-dir)."""

    data: str
    sets: tuple[str, ...]
    model: str
    pretrained: str
    out: str
    batch_size: int
    workers: int
    keep: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run(job: Job) -> None:
    """CLIP_benchmark's `eval` over all sets."""
    from clip_benchmark import cli

    # It tells retrieval from classification by names of sets that it knows; the sets themselves say it too.
    cli.get_dataset_default_task = lambda name: (  # type: ignore[attr-defined]
        "zeroshot_retrieval" if is_retrieval(Path(job.data, name)) else "zeroshot_classification"
    )
    scores = _keep_scores() if job.keep else []
    words = ["eval", "--dataset", *(f"wds/{name}" for name in job.sets), "--dataset_root", f"{job.data}/{{dataset}}"]
    words += ["--model", job.model, "--pretrained", job.pretrained, "--output", f"{job.out}/{{dataset}}.json"]
    words += ["--no_amp", "--quiet", "--recall_k", "1", "5", "10"]
    sys.argv = ["clip_benchmark", *words, "--batch_size", str(job.batch_size), "--num_workers", str(job.workers)]
    cli.main()
    for name, found in zip(job.sets, scores, strict=False):
        np.savez(Path(job.out, f"{name}.npz"), keys=_keys(job, name), **found)


def is_retrieval(folder: Path) -> bool:
    """Whether a set in CLIP_benchmark's layout has captions."""
    kind = folder / "dataset_type.txt"
    return kind.exists() and kind.read_text().strip() == RETRIEVAL


def _keep_scores() -> list[dict[str, Any]]:
    """By set, filled in as they are evaluated: the logits (N, C) and labels (N,), or the cosines (M, N) and which
    pairs belong together."""
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    kept: list[dict[str, Any]] = []
    classify, batchify = zeroshot_classification.run_classification, zeroshot_retrieval.batchify

    def run_classification(*args: Any, **options: Any) -> Any:
        logits, labels = classify(*args, **options)
        kept.append({"scores": logits.numpy(), "labels": labels.numpy()})
        return logits, labels

    def of_retrieval(function: Any, scores: Any, pairs: Any, *args: Any, **options: Any) -> Any:
        # It is called for each direction and depth; the first of each set is of captions by images.
        if options["k"] == 1 and scores.is_contiguous():
            kept.append({"scores": scores.numpy(), "labels": pairs.numpy()})
        return batchify(function, scores, pairs, *args, **options)

    zeroshot_classification.run_classification = run_classification
    zeroshot_retrieval.batchify = of_retrieval
    return kept


def _keys(job: Job, name: str) -> list[str]:
    """Keys of the images in the order in which its loader, with its processes, gives them."""
    import webdataset
    from torch.utils.data import DataLoader

    shards = int(Path(job.data, name, "test", "nshards.txt").read_text())
    pattern = f"{job.data}/{name}/test/{{0..{shards - 1}}}.tar"
    keys = webdataset.WebDataset(pattern, nodesplitter=lambda src: src).to_tuple("__key__")
    batches = DataLoader(keys.batched(job.batch_size), batch_size=None, shuffle=False, num_workers=job.workers)
    return [key for (batch,) in batches for key in batch]


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
