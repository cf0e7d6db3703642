"""One file per sub-command, and the flags they share."""
