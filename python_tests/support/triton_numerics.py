"""Poisoned parents, patterned gradients and the tolerance rule of the Triton tests."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def inside(values: Tensor, fill: float) -> Tensor:
    """The same values as a view cut out of a larger buffer, which holds ``fill`` elsewhere.

    The row stride is odd, and the view starts at an odd address.
    """
    shape = tuple(size + 3 for size in values.shape)
    parent = values.new_full(shape, fill)
    window = tuple(slice(1, size + 1) for size in values.shape)
    parent[window] = values
    return parent[window]


def poisoned(values: Tensor, *sizes: int) -> Tensor:
    """A parent of the given sizes whose leading block is ``values`` and whose rest is NaN."""
    parent = values.new_full(sizes, float("nan"))
    parent[tuple(slice(0, size) for size in values.shape)] = values
    return parent


class Patterned:
    """A gradient buffer whose leading block a kernel may write, and nothing else."""

    def __init__(self, sizes: tuple[int, ...], active: tuple[int, ...], dtype: torch.dtype):
        self.full = randn(*sizes, dtype=dtype, seed=99)
        self.before = self.full.clone()
        self._block = tuple(slice(0, size) for size in active)

    @property
    def view(self) -> Tensor:
        return self.full[self._block]

    @property
    def start(self) -> Tensor:
        """What the active block held at first."""
        return self.before[self._block]

    def assert_rest_intact(self) -> None:
        expected = self.before.clone()
        expected[self._block] = self.view
        # Compared as bytes: bit for bit, whatever the bits mean.
        assert torch.equal(self.full.view(torch.uint8), expected.view(torch.uint8))


def assert_accurate(actual: Tensor, same_dtype: Tensor, oracle: Tensor) -> None:
    """The error against float64 is at most twice that of PyTorch in the same dtype, plus 1e-6."""
    assert oracle.dtype == torch.float64
    assert actual.shape == oracle.shape == same_dtype.shape
    if oracle.numel() == 0:
        return
    assert torch.isfinite(actual).all() and torch.isfinite(same_dtype).all()
    error = (actual.double() - oracle).abs().max().item()
    allowed = 2 * (same_dtype.double() - oracle).abs().max().item() + 1e-6
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


class AddressWatch:
    """Checks every address that interpreted kernels load from or store to.

    Inside the buffers that the given views are cut out of, only the views' own elements may be
    touched, loaded or stored. A value that is loaded and then thrown away shows up here too.
    """

    def __init__(self, **views: Tensor) -> None:
        self._buffers = {}
        self.touched: set[str] = set()
        for name, view in views.items():
            storage = view.untyped_storage()
            allowed = torch.zeros(storage.nbytes() // view.element_size(), dtype=torch.bool)
            allowed.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            self._buffers[name] = (storage.data_ptr(), view.element_size(), allowed.numpy())

    def check(self, pointers, mask) -> None:
        active = pointers.data[mask.data.astype(bool)].astype("int64")
        for name, (base, size, allowed) in self._buffers.items():
            element = (active - base) // size
            element = element[(element >= 0) & (element < len(allowed))]
            if len(element):
                self.touched.add(name)
            assert allowed[element].all(), f"{name}: element {element[~allowed[element]][0]}"

    def install(self, monkeypatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def checked_load(builder, pointers, mask, *rest):
            self.check(pointers, mask)
            return load(builder, pointers, mask, *rest)

        def checked_store(builder, pointers, value, mask, *rest):
            self.check(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
