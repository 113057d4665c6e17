"""From a model to graphs, and from graphs back to a module."""
