"""Other people's caches: embeddings imported from a folder of clip-retrieval, and exported to one."""
