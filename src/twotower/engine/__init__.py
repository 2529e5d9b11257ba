"""Runs many requests in one process, with the same decoding steps as `generate`; every round is scheduled anew."""
