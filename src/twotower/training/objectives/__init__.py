"""What a tower learns: the protocol that the trainer knows, and a file for each objective."""
