"""A scaling searched before training: candidates scored on tokens that need the long context, factors evolved."""
