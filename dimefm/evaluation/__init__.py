"""Evaluation: published sets, their protocols and metrics, and the results of a model."""
