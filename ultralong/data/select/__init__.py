"""Which documents are kept: length rule, cleaning, overlap with tests."""
