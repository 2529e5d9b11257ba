"""Training a denoiser for a frozen context tower."""
