"""A training step traced on fake tensors: its layers, and its attention through the real schemes."""
