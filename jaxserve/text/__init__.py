"""Text at the edge of the engine: tokenizing, chat templates, incremental detokenizing, stop strings. No JAX."""
