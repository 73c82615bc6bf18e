"""The machine and its files: paths and URLs, locks, progress, memory, GPUs, versions."""
