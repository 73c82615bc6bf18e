"""What runs on Ray: stage 1, and the parts of an index. No other package imports ray."""
