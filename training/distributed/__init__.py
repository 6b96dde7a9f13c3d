"""Several processes: weights in shards, samples divided among processes."""
