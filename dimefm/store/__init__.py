"""What is on disk: embedding stores, their arrays and commits, pairs, pixel tars, selected texts."""
