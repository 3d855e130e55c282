"""Time, memory and accuracy of a run, for the report, the benchmarks, the tests and the checks of `accelerate`."""
