"""The operators of torch, their effects on memory, and the code that a call of a module runs."""
