"""Which sentences are worth training on: `select-texts`."""
