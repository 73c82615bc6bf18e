"""What can be said of a run from its config alone: what it lacks, and what its user may not have meant. No torch, but
for another optimizer than AdamW."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cache_schemas.run import RUN_FILE
from dimefm.errors import TrainingError
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean
from dimefm.system.wording import counted
from dimefm.training.config import NEVER_DIFFER, LossConfig, TextMix, TrainConfig

_FIELDS = "dimefm train-student --fields lists all"


def require_startable(config: TrainConfig) -> None:
    """Raises StoreError for a cache at a URL, and TrainingError for a config that lacks an input that it draws from,
    the library that it logs to or its optimizer, or whose learning rate would not rise to its peak and fall. A run of
    an older release, which did not look at the latter, goes on."""
    if config.log_to and not _is_installed(config.log_to):
        remedy = f'pip install "dimefm[{config.log_to}]"'
        raise TrainingError(f"the run cannot be logged to {config.log_to}, which is not installed here", remedy=remedy)
    if config.cache_dir:
        storage.local(config.cache_dir, "a cache")
    if config.optimizer != "adamw":
        from dimefm.training.optimizer import require_optimizer  # imports torch and timm, which know the others

        require_optimizer(config)
    mix = config.text_mix if config.loss.vl else TextMix()
    paired = config.loss.contrastive > 0
    require_sources(mix, config.pairs, config.selection, config.captions, paired=paired and not config.captions)
    if (Path(config.out) / RUN_FILE).exists():
        return
    rates = ("min_lr", "warmup_lr") if config.warmup_epochs else ("min_lr",)
    higher = [name for name in rates if getattr(config, name) > config.lr]
    if higher:
        what = ", ".join(f"{name} ({getattr(config, name):g})" for name in higher)
        settings = " ".join(f"--set {name}={config.lr / 20:g}" for name in higher)
        raise TrainingError(f"{what} must not be above lr ({config.lr:g}), its peak", remedy=f"give {settings}")


def _is_installed(package: str) -> bool:
    """Whether pip has it. A folder of its name, which wandb leaves where it runs, could be imported too."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def require_sources(mix: TextMix, pairs: object, selection: object, captions: object = None, *, paired: bool) -> None:
    """Raises TrainingError for a mix that draws from `pairs`, a `selection` or `captions` that are None. `paired`: a
    loss needs each image's own sentence, which no captions give."""
    if captions is None and mix.captions:
        remedy = "run cache-images with --captions, and give its --captions-out"
        raise TrainingError("captions in the text mix need --captions", remedy=remedy)
    if pairs is None and (mix.retrieved or paired):
        if mix.retrieved:
            raise TrainingError("retrieved texts need --pairs", remedy="run dimefm retrieve first")
        remedy = "run cache-images with --captions, or else dimefm retrieve first"
        raise TrainingError("the contrastive loss needs --captions or --pairs", remedy=remedy)
    if mix.selected and pairs is None and selection is None:
        remedy = "run dimefm retrieve first, and select-texts for a selection"
        raise TrainingError("selected texts need --selection or --pairs", remedy=remedy)


def require_changeable(names: tuple[str, ...]) -> None:
    """Raises TrainingError for names in --allow-changes that are no fields, or fields that never change."""
    fields = TrainConfig.__dataclass_fields__.keys()
    for name in names:
        if name not in fields:
            near = did_you_mean(name, fields - set(NEVER_DIFFER), _FIELDS)
            raise TrainingError(f"--allow-changes: no field is called {name!r}", remedy=near)
    fixed = [name for name in names if name in NEVER_DIFFER]
    if fixed:
        why = "a checkpoint has the weights of its towers and the state of its optimizer, and counts in its batches"
        what = f"--allow-changes: {', '.join(fixed)} cannot change within a run: {why}"
        raise TrainingError(what, remedy="train a new run, with another --out")


def notes_on_inputs(config: TrainConfig) -> list[str]:
    """Notes on inputs that are given, and that no loss uses; and on teachers that lack what a loss would use."""
    needing = [name for name in LossConfig.OF_TEXTS if getattr(config.loss, name)]
    lacking = [images for images, texts in config.teachers if needing and texts is None]
    lacks = [
        f"the teacher of {images} has no sentences: {' and '.join(needing)} will not be learned from it"
        for images in lacking
    ]
    return lacks + _notes_on_unused(config)


def _notes_on_unused(config: TrainConfig) -> list[str]:
    if config.loss.vl:
        return []
    mix = ",".join(f"{kind}={share:g}" for kind, share in vars(config.text_mix).items() if share)
    idle = [f"the text mix {mix}"] if config.text_mix != TextMix() else []
    if config.selection and not config.text_student:
        idle.append(f"the selection {config.selection}")
    contrasted = bool(config.loss.contrastive) and not config.captions  # with retrieved sentences
    if config.pairs and not contrasted:
        idle.append(f"the pairs {config.pairs}")
    if config.captions and not config.loss.contrastive:
        idle.append(f"the captions {config.captions}")
    if not (contrasted or config.text_student or (config.val and not config.val_texts)):
        idle += [f"the sentences of {texts}" for _, texts in config.teachers if texts]
    if not idle:
        return []
    return [f"not used: {', '.join(idle)}: the vl loss, of images and sentences, has weight 0 (--loss vl=...)"]


def notes_on_rate(config: TrainConfig) -> list[str]:
    """A note on a vision transformer that Muon would train at the rate of a ResNet (docs/recipes.md)."""
    transformer = Path(config.student).name.lower().startswith(("vit", "deit", "eva"))
    if not (transformer and config.optimizer.endswith("muon") and config.lr > 0.01):
        return []
    return [f"at lr {config.lr:g} Muon teaches a vision transformer less than at 0.003, which --recipe best-vit has"]


def notes_on_length(config: TrainConfig, steps: int, steps_per_epoch: int) -> list[str]:
    """Notes on a run that ends within its warm-up, or before its first validation is due."""
    notes, warmup = [], config.warmup_steps(steps_per_epoch)
    if warmup >= steps:
        reached = config.warmup_lr + (config.lr - config.warmup_lr) * (steps - 1) / warmup
        notes.append(
            f"the run ends within its warm-up, which takes {counted(warmup, 'step')} "
            f"(warmup_epochs={config.warmup_epochs:g}): after {counted(steps, 'step')} the learning rate is "
            f"{reached:.2g}, not {config.lr:g}: give a shorter one, such as --set "
            f"warmup_epochs={steps / steps_per_epoch / 20:.2g}, or a longer run"
        )
    every = config.validation_steps(steps_per_epoch)
    if config.val and every > steps:
        notes.append(
            f"the student is validated once, at the end: a validation is due every {counted(every, 'step')} "
            f"(--val-every {config.val_every:g}), and the run has {steps:,}"
        )
    return notes
