"""Parts of training, each by itself to be timed: a bare step, a step by its number of texts, a step with the teacher in
it, the reading of targets, the whole loop."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cache_schemas import StudentSpec
from dimefm.models.towers import build_student, has_convolutions
from dimefm.store.embedding_store import Store
from dimefm.system.matrix_products import DTYPES
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.distributed import Place
from dimefm.training.objective import Objective
from dimefm.training.optimizer import adamw
from dimefm.training.read_metrics import read_metrics
from dimefm.training.row_order import Order
from dimefm.training.text_bank import TextBank
from dimefm.training.tower_trainer import TowerTrainer
from dimefm.training.train import train


class BareStep:
    """Forward, backward and optimiser of a student on images that are there already, with nothing around them. Called,
    it takes a step; on a GPU it does not wait for it."""

    def __init__(
        self, spec: StudentSpec, batch_size: int, precision: str, device: torch.device, *, compile: bool = False
    ) -> None:
        self.module = build_student(spec)
        layout = torch.channels_last if has_convolutions(self.module) else torch.contiguous_format
        self.module.to(device, memory_format=layout)
        self._tower: Any = torch.compile(self.module) if compile else self.module
        self._optimizer = adamw([self.module], lr=1e-5, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
        size = (batch_size, 3, spec.image_size, spec.image_size)
        self.images = torch.randn(size, device=device).to(memory_format=layout)
        self._target = torch.nn.functional.normalize(torch.randn(batch_size, spec.embed_dim, device=device), dim=-1)
        self._device, self._dtype = device, DTYPES[precision]

    def __call__(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            features = self._tower(self.images)
        loss = 1 - (torch.nn.functional.normalize(features.float(), dim=-1) * self._target).sum(dim=1).mean()
        loss.backward()
        self._optimizer.step()


def with_teacher(bare: BareStep, tower: Any, size: int, precision: str, device: torch.device) -> Callable[[], None]:
    """A bare step behind a teacher's image tower for images of `size` pixels, its weights held in that precision;
    untrained, its time is the same."""
    tower = tower.to(device, DTYPES[precision]).eval().requires_grad_(False)
    images = torch.randn(len(bare.images), 3, size, size, device=device, dtype=DTYPES[precision])

    def step() -> None:
        with torch.inference_mode():
            tower(images)
        bare()

    return step


def by_texts(
    bare: BareStep, spec: StudentSpec, totals: tuple[int, ...], precision: str, device: torch.device
) -> dict[int, Callable[[], None]]:
    """A whole step, without loading, with the paper's losses over each number of texts; it is waited for."""

    def unit(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, spec.embed_dim, device=device), dim=-1)

    objective = Objective(LossConfig(vl=0.7, pvl=0.3), teacher_scale=100.0, dim=spec.embed_dim, mean_D=None)
    place = Place(0, 1, device)
    trainer = TowerTrainer(bare.module, objective, place, prepare=lambda images: images, precision=precision)
    optimizer = adamw([bare.module], lr=1e-5, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    teacher, scaler = unit(len(bare.images)), torch.amp.GradScaler(device.type, enabled=False)

    def step(text_TD: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            learned = trainer.learn(bare.images, teacher, text_TD, None, seed=(0, 0), scaler=scaler)
            optimizer.step()
            learned.values["loss"].item()

        return run

    return {total: step(unit(total)) for total in totals}


def loop_lines(config: TrainConfig) -> list[dict[str, Any]]:
    """Train, and give the lines that it logged of its steps. The checkpoints are deleted."""
    train(config)
    for path in Path(config.out).glob("checkpoints/*.pt"):
        path.unlink()
    return [line for line in read_metrics(config.out) if line["event"] == "train"]


def target_seconds(images: Store, texts: Store, batch_size: int, total: int, device: torch.device) -> float:
    """Mean seconds that a step's cached targets take where they are read, once their chunks were read before."""
    order = Order(store=images, seed=0, batch_size=batch_size)
    bank = TextBank(texts, TextMix(), None, seed=0, total=total, device=device)
    spent = []
    for number, _, rows in order.steps(0, 200):
        began = time.perf_counter()
        images.gather(rows)
        bank.draw(number, rows)
        spent.append(time.perf_counter() - began)
    return statistics.mean(spent[50:])
