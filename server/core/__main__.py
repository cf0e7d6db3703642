"""`python -m server.core`: the engine core process."""

from server.core.process import main

main()
