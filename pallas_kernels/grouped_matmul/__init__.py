"""Rows of activations, each times the weight of its group (mixture of experts)."""
