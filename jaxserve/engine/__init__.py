"""The engine: scheduler and runner joined (core), on their own thread (loop), with text at the edge (assembler)."""
