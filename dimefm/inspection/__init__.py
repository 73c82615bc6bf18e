"""`info`, `verify` and `doctor`: what is on disk, whether it can be trusted, and what this machine is."""
