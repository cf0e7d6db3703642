"""The parts of the supervisor: ports, child processes, what keeps them alive, and the lines to try."""
