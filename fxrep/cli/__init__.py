"""Models for the command line and the benchmarks."""
