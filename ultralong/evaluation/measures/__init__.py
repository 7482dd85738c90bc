"""What is measured of a model: needles, perplexity, loss, short benchmarks."""
