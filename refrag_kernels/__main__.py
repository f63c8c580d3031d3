"""``python -m refrag_kernels``: what this build and this machine offer."""

from refrag_kernels.report import collect

print(collect())
