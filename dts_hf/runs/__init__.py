"""A run on the disk: its directory, its checkpoints, where it starts, how it ends, and what can go wrong."""
