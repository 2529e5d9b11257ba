"""Pure tensor functions, one file per op family. The reference PyTorch here is also the CPU path."""
