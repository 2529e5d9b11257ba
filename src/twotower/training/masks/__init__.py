"""Which places of a training row are masked, and what the denoiser is told of it."""
