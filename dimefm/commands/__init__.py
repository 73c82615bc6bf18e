"""The commands, a file for each family: each parses its options and makes one library call."""
