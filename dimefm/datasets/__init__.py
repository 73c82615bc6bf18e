"""Labelled sets: the 28 that are known, and those of a user."""
