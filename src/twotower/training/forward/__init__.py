"""The training pass: both towers over all blocks of a sequence at once, differentiable."""
