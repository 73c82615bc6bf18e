"""Labelled sets. A known set has a definition in sets/; an own set is a folder of the user's with its class names.

To add a known set: write sets/NAME.json (`cache_schemas.evaluation.SetDefinition` explains the fields), and its line of
published facts in PUBLISHED of tests/datasets/test_definitions.py. Sets kept as tars, Parquet files or class folders
need no more: the tests write tiny copies of every definition and read them. For a layout of its authors, add a reader
to published_layouts.py or raw_arrays.py and a writer to tests/synthetic_published.py. `dimefm sets NAME` then shows it.
"""
