"""Quality retention and throughput gain of the decoding modes, sweeps over their settings, and an lm-eval adapter."""
