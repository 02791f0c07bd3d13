"""One kernel at a time: PyTorch's ways (B0, B1, B2) and this library's, on the same numbers.

``ours`` is the back end that the library's dispatcher chooses on the device, called without the
autograd layer above it. B1 (strided views, in place) is what the reference back end does.
"""
