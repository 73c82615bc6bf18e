"""`python -m benchmarks.cpu_worker PRECISION THREADS SECONDS`: forward and backward of a student; prints images/s."""

import sys
import time

import timm
import torch

STUDENT, SIDE, BATCH = "resnet10t", 64, 64


def main(precision: str, threads: int, seconds: float) -> None:
    """Steps for so many seconds, after two that are not counted."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(STUDENT, num_classes=512).to(memory_format=torch.channels_last)
    pixels_B3HW = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    steps, began = -2, time.perf_counter()
    while steps < 1 or time.perf_counter() - began < seconds:
        if steps == 0:
            began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            features_BD = model(pixels_B3HW)
        features_BD.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        steps += 1
    print(steps * BATCH / (time.perf_counter() - began))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
