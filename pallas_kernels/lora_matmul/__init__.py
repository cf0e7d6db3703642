"""Low-rank adapters, a different one for every token of a batch."""
