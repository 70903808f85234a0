"""Settings and arguments: read from flags, and checked."""
