"""Documents and conversations from files, archives, registries and data sets."""
