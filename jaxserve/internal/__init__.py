"""What the processes of one server say to each other; no interface for anyone else."""
