"""Weight-only quantisation: which parameters are kept in few bits, and how."""
