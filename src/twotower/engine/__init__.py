"""Many requests in one process: each forward step is scheduled anew, over the same steps as `generate`."""
