"""Making corpora, shards of token rows on disk, from texts or from samples of the context tower."""
