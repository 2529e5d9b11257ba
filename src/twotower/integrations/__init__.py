"""Two towers on others' engines and clusters."""
