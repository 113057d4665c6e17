"""Readings of nodes: an operation as affine maps of its operands, however it is spelt."""
