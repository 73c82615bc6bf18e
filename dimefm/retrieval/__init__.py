"""Which sentences are nearest to an image: exact search, FAISS indexes, `retrieve` and `search`."""
