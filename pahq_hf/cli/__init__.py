"""The `pahq` command: one file a command."""
