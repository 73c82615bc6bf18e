"""The authors' own training loop, timed: `python authors_worker.py JOB`, JOB being a `Job` as JSON.

Runs their `Training/train_amp.py` from a checkout of their repository, by its own `main()` and with the options of
their README, until enough steps are timed. Nothing of their code is here; what has to be changed for it to run on this
machine, on this student, is changed from outside, each change with its reason. Prints the images/s as the last line.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision.transforms as T

from cache_schemas import StudentSpec, parse_dataclass
from dimefm.models.towers import build_student

_TEXT_LENGTH = 77


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: their checkout, the folder of TSV files, the student (a StudentSpec), and how many steps are timed
    after how many.

    `resize` is the short side that images are resized to before the crop. `repaired`: their loader without what it does
    anew for every item. `precision` holds on a CPU; on a GPU theirs is fp16.
    """

    authors: str
    data: str
    student: dict[str, Any]
    resize: int
    batch_size: int
    workers: int
    precision: str
    warm_up: int
    steps: int
    repaired: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class _Enough(Exception):
    """Raised out of their loop after the last timed step."""


def run(job: Job) -> float:
    """Images/s over `steps` steps after `warm_up` steps."""
    # Their modules must be found before others of the same names ("datasets", "utils").
    training = Path(job.authors) / "Training"
    sys.path.insert(0, str(training))
    # The changes live in this process, and the loaders' processes must inherit them.
    multiprocessing.set_start_method("fork")
    _stand_in_modules(job)

    import train_amp

    _size_of_student(job)
    if not torch.cuda.is_available():
        _without_gpu(job)
    # Their wrapper asks the tower's first convolution for its dtype, by its name in a ViT: timm's have other names.
    train_amp.ImageCLIP.dtype = torch.float32
    if job.repaired:
        _repair_loader()
    times = _time_steps(job)
    lists = [f"{job.data}/{name}.list" for name in ("image", "image_feat", "text", "text_feat")]
    with tempfile.TemporaryDirectory() as out:
        config = training / "configs" / "models" / "vitb32_large_language.yaml"
        words = ["--amp", "--use_pvl_loss", "--dataroot", job.data, "--tsv_file_list", *lists, "--output_dir", out]
        numbers = ["--batch_size", str(job.batch_size), "--num_workers", str(job.workers)]
        sys.argv = ["train_amp.py", *words, *numbers, "--student_config_file", str(config)]
        try:
            train_amp.main()
        except _Enough:
            return job.steps * job.batch_size / (times[-1] - times[job.warm_up - 1])
    raise RuntimeError(f"their epoch ended after {len(times)} steps: write more rows")


def _stand_in_modules(job: Job) -> None:
    """Modules that theirs import, under their names."""
    # The student is the one that dimefm trains, in the place of their ViT: their code goes on with its `visual`.
    spec = parse_dataclass(StudentSpec, job.student, "the job's student")

    class Tower(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.visual = build_student(spec)

    _module("clip")
    _module("clip.model", CLIP=Tower)
    # Another student of theirs, which is not built here; it needs timm modules that have moved since.
    _module("unicl_model", UniCLModel=None)
    # Imported and never used.
    _module("yacs")
    _module("yacs.config", CfgNode=None)

    # Their loader tokenises each text, though their loss reads nothing but the cached features, with a vocabulary from
    # the network. Made free of cost here, which can only make theirs faster.
    class Tokenizer:
        @staticmethod
        def from_pretrained(_: str) -> "Tokenizer":
            return Tokenizer()

        def add_special_tokens(self, _: dict[str, Any]) -> None: ...

        # None for the end of a text: they give it another role.
        eos_token = None

        def __call__(self, _: str, **__: Any) -> dict[str, torch.Tensor]:
            names = ("input_ids", "attention_mask")
            return {name: torch.zeros(1, _TEXT_LENGTH, dtype=torch.long) for name in names}

    _module("transformers", CLIPTokenizer=Tokenizer, AutoTokenizer=Tokenizer)


def _module(name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def _size_of_student(job: Job) -> None:
    """Their augmentation at the student's size: they have written 224 and 256 into it."""
    import datasets.build

    theirs = datasets.build.build_transform

    def build_transform() -> Any:
        steps = theirs()
        for step in steps.transforms:
            if isinstance(step, T.RandomResizedCrop):
                step.size = (job.student["image_size"],) * 2
            elif isinstance(step, T.Resize):
                step.size = job.resize
        return steps

    datasets.build.build_transform = build_transform


def _without_gpu(job: Job) -> None:
    # They move each batch to a GPU, whether there is one or not.
    torch.Tensor.cuda = lambda self, *_, **__: self
    # Their mixed precision is a GPU's alone, and would be off: the CPU's instead, so that both sides compute alike.
    low = job.precision == "bf16"
    torch.cuda.amp.autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=low)


def _repair_loader() -> None:
    """Files are opened and indices read once a process: they already keep objects that do so, but use fresh ones for
    each item, which read the whole index again, and collect garbage when they are dropped."""
    import datasets.tsv_file

    def get(self: Any, index: int) -> list[str]:
        source, row = self._calc_chunk_idx_row(index)
        return self.tsvs[source].seek(row)  # type: ignore[no-any-return]

    datasets.tsv_file.CompositeTSVFile.__getitem__ = get


def _time_steps(job: Job) -> list[float]:
    """The time after each step, filled in as they are taken: at their scheduler's step, the last thing that a step does
    to the student."""
    import utils.utils_amp

    theirs, times = utils.utils_amp.step_update, list[float]()

    def step_update(schedulers: Any, step: int) -> Any:
        theirs(schedulers, step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if len(times) == job.warm_up + job.steps:
            raise _Enough

    utils.utils_amp.step_update = step_update
    return times


if __name__ == "__main__":
    rate = run(Job(**json.loads(sys.argv[1])))
    print(json.dumps(rate))
