"""From texts, or from the context tower's own samples, to shards of token rows."""
