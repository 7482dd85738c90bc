"""Documents tokenised in parallel into shards with a manifest."""
