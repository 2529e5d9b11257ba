"""CPU kernels in C: the ops of `twotower.ops` with the same names and signatures, for float32 activations.

Compiled by the machine's own C compiler when first needed, see `build`. Weights are bf16 or float32. No gradients.
"""
