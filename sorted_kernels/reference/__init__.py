"""Plain-PyTorch implementations: the oracle of every test, the CPU back end, the fallback on CUDA.

Each module has the same function names as its twin in ``sorted_kernels.triton``. All of them take
the parent weight and sizes as counts, slice it as a strided view, and copy nothing. Callers have
checked the arguments. A ``*_into`` function writes a gradient into ``out``, a view of the
parameter's gradient: it adds when ``accumulate`` is true and overwrites when it is false.
"""
