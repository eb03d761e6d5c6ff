"""The microbenchmark: `python -m bench --help`. rows are in bench.rows, timing in bench.timing."""
