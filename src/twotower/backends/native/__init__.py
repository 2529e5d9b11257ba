"""C for CPUs: bfloat16 or float32 weights, float32 activations, no gradients. The machine's own C compiler builds it
when it is first needed, see `build`.

A row's results have the same bits whatever shares its batch, and a token's whatever chunk it comes in: the order of
every sum depends on the length of the sum alone.
"""

from twotower.backends.native.pack import pack_weight
from twotower.backends.native.tower import missing, state_dtypes, take_tower_

__all__ = ["missing", "pack_weight", "state_dtypes", "take_tower_"]
