"""The training pass: every block of a sequence at once, each seeded with the context tower's states before it."""
