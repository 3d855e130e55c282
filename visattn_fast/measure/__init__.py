"""Time, memory and accuracy of a run: what report, benchmarks and the checks of `accelerate` share."""
