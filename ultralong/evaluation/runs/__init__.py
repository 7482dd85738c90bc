"""Many tests in one resumable run."""
