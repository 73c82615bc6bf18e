"""How large the steps' inputs are: on a GPU, and small on a CPU, where the same code is tried out and no number means
anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`teacher` and `student` are open_clip's names, or timm's; a teacher of None is a tiny one of random weights.
    `width` is that of the stores' embeddings. `pace` is how long things take against the seconds foreseen on a GPU."""

    teacher: str | None
    student: str
    width: int
    pace: float
    product: int  # side of the square matrices multiplied to find the peak
    copy: int  # bytes copied to find the memory's speed
    pictures: int  # distinct JPEGs
    images: int  # members of the tar
    sentences: int
    compared: int  # images whose embeddings are compared with the CPU's
    batch: int  # of stage 1
    batches: tuple[int, ...]  # of the teacher, to compare
    encoded: int  # images of a timed run of stage 1
    compile_seconds: float  # that must be left for torch.compile to be tried, whatever the pace
    rows: tuple[int, ...]  # of exact search's stores
    queries: int
    train_batch: int
    train_steps: int
    totals: tuple[int, ...]  # texts of a step
    sample: int  # images of the shipped sample that the quality step takes
    views: int
    epochs: float  # against the recipe's own

    @property
    def name(self) -> str:
        """The teacher's, to be shown."""
        return self.teacher or "tiny teacher"


GPU = Sizes(
    teacher="ViT-L-14", student="ViT-B-32", width=768, pace=1.0, product=8192, copy=2**32, pictures=48, images=4096,
    sentences=32768, compared=16, batch=512, batches=(256, 512, 1024, 2048), encoded=16384, compile_seconds=75,
    rows=(1_000_000, 5_000_000), queries=65536, train_batch=640, train_steps=60,
    totals=(640, 2560, 10240, 32768, 65536), sample=10**6, views=16, epochs=10,
)  # fmt: skip

SMALL = Sizes(
    teacher=None, student="test_vit", width=64, pace=0.05, product=256, copy=2**20, pictures=4, images=48,
    sentences=256, compared=4, batch=8, batches=(4, 8), encoded=64, compile_seconds=300,
    rows=(4096,), queries=64, train_batch=8, train_steps=6,
    totals=(8, 32, 64), sample=64, views=2, epochs=0.1,
)  # fmt: skip
