"""The two-tower network: mixers, layers, towers and the state that the context tower owns."""
