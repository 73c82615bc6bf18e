"""Other people's caches: import their embeddings into a store, and export a store for their tools."""
