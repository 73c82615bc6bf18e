"""A model on labelled sets: features, protocols, metrics, results, and tables of them."""
