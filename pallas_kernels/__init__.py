"""Kernels of jaxserve: arrays in, arrays out. Imports JAX only.

Every op is a folder: `reference.py` is plain `jax.numpy`, the truth that any other backend file is tested against.
`dispatch.choose` picks a backend per op once, at start-up, and says which.
"""
