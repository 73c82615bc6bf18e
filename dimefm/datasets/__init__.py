"""Labelled sets. A known set has a definition in sets/; an own set is a folder of the user's with its class names.

To add a known set, write sets/NAME.json (`cache_schemas.evaluation.SetDefinition` explains the fields; its suite is
"more" unless it belongs to a published table) and one line of published facts in OTHERS of tests/datasets/
test_definitions.py. A set kept as tars, Parquet files or class folders needs no more: the tests write tiny copies of
every definition and read them. For a layout of its own, add a reader to published_layouts.py or raw_arrays.py and a
writer to tests/synthetic_published.py. `dimefm sets NAME` then shows it.
"""
