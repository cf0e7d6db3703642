"""Checkpoints: a path or hub id goes in, checked parameters on their device come out. Nothing in them is run."""
