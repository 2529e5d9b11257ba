"""A training run: the loop, its optimiser and schedules, ranks, and saved states."""
