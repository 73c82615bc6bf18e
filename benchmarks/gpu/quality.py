"""Students of the shipped sample with more to see than a CPU gives them: cached views of each image, ten times the
images seen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from benchmarks.gpu.forked import forked
from benchmarks.gpu.inputs import encode
from benchmarks.gpu.kit import Kit
from benchmarks.stage1 import write_tar
from cache_schemas import ViewPlan
from dimefm.caching.plan import PlanRequest
from dimefm.models.clip import load_clip, teacher_precision
from dimefm.reproduce.stages import sample_scale
from dimefm.retrieval.retrieve import retrieve
from dimefm.sample import sample_dir
from dimefm.store.embedding_store import Store
from dimefm.training.config import TrainConfig
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import sample, sample_paper
from dimefm.training.train import train

_CLASSES = {"cifar10": 10, "caltech101": 100}
_BATCH, _LR = 128, 2.0  # images of a step, and the learning rate against that of the recipe's 32: by the square root
_SPARE = 8.0  # seconds of a run that are not steps


def quality(kit: Kit) -> None:
    """Zero-shot top-1 of the sample's two recipes."""
    images, texts, prompts, pairs = forked(kit, partial(_stores, kit))
    bars = {student.recipe: student.bars for student in sample_scale().students}
    ways = (
        ("sample", sample(images, texts, "")),
        ("sample-paper", replace(sample_paper(images, texts, ""), pairs=pairs)),
    )
    for number, (name, config) in enumerate(ways):
        config = replace(
            config, batch_size=min(_BATCH, Store(images).schema.rows // 4), lr=_LR * config.lr, workers=None,
            device=kit.device.type, checkpoint_every=10**6,
            out=str(kit.inputs.scratch(f"probe-{name}")),
        )  # fmt: skip
        share = (kit.left() - 5) / (len(ways) - number)
        epochs = min(
            kit.sizes.epochs * config.epochs, forked(kit, partial(_affordable, config, share, kit.sizes.train_steps))
        )
        if epochs <= 0:
            kit.line(f"left out: a student by {name}", f"{share:.0f} s left for it")
            continue
        val = tuple(str(sample_dir() / "eval" / which) for which in _CLASSES)
        config = replace(config, epochs=epochs, val=val, val_texts=prompts, val_every=epochs, warmup_epochs=epochs / 20,
                         out=str(kit.inputs.scratch(f"run-{name}")))  # fmt: skip
        result = forked(kit, partial(train, config))
        seen = result.steps * config.batch_size
        rate = read_metrics(config.out)[0]["images_per_second"]
        at = f"{name}, {config.student} at {config.image_size} px, batch {config.batch_size}, "
        at += f"{kit.sizes.views} cached views, {seen:,} images seen, {rate:,.0f} images/s"
        for which, classes in _CLASSES.items():
            least = bars[name][which] / classes
            kit.bar(f"zero-shot top-1 on {which}", result.validation[which], "", at, least=least)


def _affordable(config: TrainConfig, seconds: float, steps: int) -> float:
    """Epochs that fit into so many seconds, by the rate of a run of some steps; 0 where not even that fits."""
    if seconds < 2 * _SPARE:
        return 0.0
    train(replace(config, max_steps=steps, epochs=1000, log_every=steps // 3))
    rate = read_metrics(config.out)[1]["images_per_second"]  # neither its beginning nor its end
    return float((seconds - 2 * _SPARE) * rate / Store(config.images).schema.rows)


def _stores(kit: Kit) -> tuple[str, str, str, str]:
    """The sample's images by views, its sentences, the prompts of its sets, and what is retrieved for each image."""
    root, device, folder = sample_dir(), kit.device.type, kit.inputs.folder
    clip = load_clip(f"local-dir:{root / 'teacher'}", precision=teacher_precision(device), device=device)
    jpegs = kit.inputs.sample_images(kit.sizes.sample)
    tar = write_tar(folder / "quality/images.tar", {f"{i:06d}.jpg": jpeg for i, jpeg in enumerate(jpegs)})
    views = ViewPlan(count=kit.sizes.views, seed=0, crop_scale=(0.4, 1.0), flip=True)
    sets = tuple(str(root / "eval" / which) for which in _CLASSES)
    sentences = str(root / "texts") if kit.sizes.sample > len(jpegs) else str(kit.inputs.text_file())
    requests = {
        "images": PlanRequest(kind="image", arguments=(str(tar),), views=views, batch_size=kit.sizes.batch),
        "texts": PlanRequest(kind="text", arguments=(sentences,), batch_size=kit.sizes.batch),
        "prompts": PlanRequest(kind="text", arguments=sets, batch_size=kit.sizes.batch),
    }
    paths = {name: folder / f"quality-{name}.zarr" for name in requests}
    for name, request in requests.items():
        encode(request, paths[name], clip)
    pairs = str(kit.inputs.scratch("quality-pairs.zarr"))
    retrieve(str(paths["images"]), str(paths["texts"]), top_k=16, out=pairs, device=device)
    return str(paths["images"]), str(paths["texts"]), str(paths["prompts"]), pairs
