"""The engine core process: scheduler, runner and JAX; its only door is the token stream."""
