"""Writes new keys and values into their pages of the KV pool."""
