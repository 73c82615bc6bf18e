"""The whole job from Python: cache images and sentences, train a student from the cache, measure it.

    python examples/cache_and_train.py IMAGES SENTENCES LABELLED_SET TEACHER OUT [STEPS]

IMAGES and SENTENCES are what `dimefm cache-images` and `cache-texts` take, LABELLED_SET a folder as docs/evaluation.md
describes it, TEACHER an open_clip model such as local-dir:FOLDER. Stop it at any moment and run it again: it goes on.
On the sample that ships with dimefm, in about ten minutes on two cores:

    S=dimefm/sample; python examples/cache_and_train.py $S/images $S/texts $S/eval/cifar10 local-dir:$S/teacher OUT
"""

import sys
from dataclasses import replace

from dimefm import CacheConfig, EvaluationConfig, LossConfig, TextMix, TrainConfig, cache, evaluate, paper, train


def small(images: str, texts: str, out: str, steps: int | None) -> TrainConfig:
    """The paper's recipe, made small: another tower, size and length. Every field of TrainConfig can be replaced."""
    return replace(
        paper(images, texts, out),
        student="test_resnet",  # timm's smallest ResNet; for real work "ViT-B-32", or whatever you want to deploy
        image_size=48,
        epochs=10,
        warmup_epochs=0.5,
        batch_size=32,
        texts_per_step=2048,
        lr=8e-3,
        loss=LossConfig(vl=0.7, pvl=0.3),
        text_mix=TextMix(random=1.0),
        max_steps=steps,
    )


def main(images: str, sentences: str, labelled_set: str, teacher: str, out: str, steps: int | None = None) -> None:
    """Each call does nothing where an earlier run has finished its part."""
    cache(CacheConfig(kind="image", sources=(images,), out=f"{out}/IMAGES.zarr", teacher=teacher))
    cache(CacheConfig(kind="text", sources=(sentences,), out=f"{out}/TEXTS.zarr", teacher=teacher))
    result = train(small(f"{out}/IMAGES.zarr", f"{out}/TEXTS.zarr", f"{out}/RUN", steps))
    print(f"{result.steps} steps done")

    config = EvaluationConfig(model=f"{out}/RUN", folders=(labelled_set,), out=f"{out}/evaluations")
    for found in evaluate(config).results:
        low, high = found.interval
        print(f"{found.set}: {found.metric} {found.value:.3f}, 95% interval {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:6], steps=int(sys.argv[6]) if len(sys.argv) > 6 else None)
