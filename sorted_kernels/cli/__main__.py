"""``python -m sorted_kernels.cli``."""

from sorted_kernels.cli import main

main()
