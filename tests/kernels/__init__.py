"""The ops of refrag_kernels, their plans and their backends."""
