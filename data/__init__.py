"""Pictures to batches: sources, index, captions, tokens, buckets, plan, dataset, latent cache."""
