"""A file with a setting."""

SCALE = 1.0


def scale() -> float:
    """The setting."""
    return SCALE
