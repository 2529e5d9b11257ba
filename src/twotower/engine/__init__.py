"""Many requests in one process: each forward step is scheduled anew, over the same step() functions as `generate`."""
