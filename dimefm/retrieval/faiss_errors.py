"""What is wrong when FAISS fails, in words of ours where its own do not help."""

from __future__ import annotations

import re

from dimefm.errors import StoreError

OTHER_FACTORY = "give another --factory, from FAISS's list of index factory strings, or none"


def reason(error: RuntimeError) -> str:
    """FAISS's message without the place in its sources."""
    return str(error).strip().split("\n")[0].rpartition(": ")[2]


def lacks_gpu_memory(error: RuntimeError) -> bool:
    """FAISS words it `StandardGpuResources: alloc fail` or `CUDA error 2 out of memory`."""
    return any(words in str(error) for words in ("alloc fail", "out of memory"))


def factory_error(factory: str, dim: int, error: RuntimeError) -> StoreError:
    """Why an index cannot be made; in words of ours where FAISS names neither the width nor what would do."""
    why = reason(error)
    if "multiple of the number of subquantizers" in why:
        divisors = ", ".join(str(number) for number in range(2, dim + 1) if dim % number == 0)
        what = f"--factory {factory}: the number after PQ does not divide the width of the vectors"
        return StoreError(what, remedy=f"the embeddings are {dim} wide: take one of {divisors}")
    if "METRIC_L2" in why:
        why = "FAISS has it for Euclidean distances alone, not for inner products"
    return StoreError(f"--factory {factory}: {why}", remedy=OTHER_FACTORY)


def training_error(factory: str, rows: int, message: str) -> StoreError:
    """Why training failed, by the numbers in FAISS's message."""
    remedy = "give another --factory, or none: one is chosen then that fits the rows"
    if found := re.search(r"training points \((\d+)\) .* number of clusters \((\d+)\)", message):
        given, needed = map(int, found.groups())
        of_what = f"the {rows:,} training rows" if given == rows else f"the {given:,} points that it has"
        what = f"--factory {factory} takes {needed:,} points to train on, more than {of_what}"
        bits = f"codes of {needed.bit_length() - 1} bits each take {needed:,}, of 4 bits (PQ8x4, say) 16; "
        return StoreError(what, remedy=(bits if needed > 16 else "") + remedy)
    if found := re.search(r"cannot output (\d+) dimensions from (\d+)", message):
        wanted, width = map(int, found.groups())
        if wanted > width:
            what = f"--factory {factory} makes {wanted} dimensions of vectors that are {width} wide"
            return StoreError(what, remedy=f"write {width} or fewer after PCA")
        what = f"--factory {factory} takes {wanted:,} rows to find as many dimensions"
        return StoreError(f"{what}, more than the {rows:,} training rows", remedy=remedy)
    return StoreError(f"--factory {factory} cannot be trained: {message.strip().splitlines()[0]}", remedy=remedy)
