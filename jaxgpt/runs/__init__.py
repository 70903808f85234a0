"""The run directory: its small files, checkpoints, metrics and pictures."""
