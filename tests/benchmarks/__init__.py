"""`python -m tests.benchmarks`: this package beside the threaded design that it replaces, on the same images."""
