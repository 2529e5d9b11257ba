"""The `twotower` command: one file per sub-command, imported only when called."""
