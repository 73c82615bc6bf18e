"""dimefm: distil a large CLIP into a small student from unpaired images and sentences (DIME-FM, ICCV 2023)."""

__version__ = "0.1.0"
