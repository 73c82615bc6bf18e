"""Look at what is on disk and at this machine: `dimefm info`, `dimefm verify` and `dimefm doctor`."""
