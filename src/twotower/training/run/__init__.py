"""One training run: the loop, its optimiser and schedules, ranks, and states on disk."""
