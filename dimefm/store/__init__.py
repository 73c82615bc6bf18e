"""What is on disk: embedding stores with their arrays, plans, commits and tars of JPEGs; pairs; selected texts; and the
rules for the folder that a command writes to."""
