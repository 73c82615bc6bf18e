"""Stage 1 without Ray: plan the rows, read and decode images, run the teacher, commit a shard."""
