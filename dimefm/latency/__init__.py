"""How fast models are: each in a process of its own, measured in turns, beside each other."""
