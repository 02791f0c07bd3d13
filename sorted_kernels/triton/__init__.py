"""Triton implementations: the twins of ``sorted_kernels.reference``, same names and arguments."""
