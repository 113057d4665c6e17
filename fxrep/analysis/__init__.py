"""Facts about the values of one graph."""
