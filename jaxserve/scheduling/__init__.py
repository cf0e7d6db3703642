"""Which tokens are computed next, and in which pages: pure Python, plans in, sampled tokens back."""
