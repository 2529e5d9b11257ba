"""Training a denoiser beside a context tower, and pretraining a single tower."""
