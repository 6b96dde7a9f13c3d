"""What expert files are: the manifest, headers, weights, LoRA keys and fingerprints."""
