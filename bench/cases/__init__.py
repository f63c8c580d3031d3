"""What the benchmarks measure: cases of each op and of the model, and who else computes the same."""
