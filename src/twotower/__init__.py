"""Two-tower diffusion language models: a frozen autoregressive context tower and a denoiser that fills blocks."""
