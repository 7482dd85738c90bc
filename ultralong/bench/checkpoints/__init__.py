"""What becomes of checkpoints: every config class of transformers extended, and what other programs read."""
