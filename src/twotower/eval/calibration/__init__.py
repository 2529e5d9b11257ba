"""Commit rules that keep what they promise of `ar`'s score: what they are fitted to, and how they are chosen."""
