"""Leaks: training images that stand in a test set, found by embedding and confirmed by their pixels."""
