"""Writing the checkpoints of a run: copies on the host, shards hashed as they are written, the background thread."""
