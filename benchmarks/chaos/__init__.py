"""Ten commands struck by kills and by faults of the file system, and run again."""
