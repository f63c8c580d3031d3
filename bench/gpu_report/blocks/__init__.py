"""The blocks of the GPU report, one module each."""
