"""The ways that a layer's gradient can take."""

import pytest

from sorted_kernels.ops import backend

ROUTES = {
    "blocks": ("inplace", True),  # lean nodes in plain PyTorch, which write the prefix
    "node": ("inplace", False),  # the node that calls the back end, as for kernels of ours
    "dense": ("dense", False),  # the pure path
}
routes = pytest.mark.parametrize("route", ROUTES)
in_place_routes = pytest.mark.parametrize("route", ["blocks", "node"])


def take(monkeypatch, route):
    """Force a route; returns the layer option that it needs."""
    mode, plain = ROUTES[route]
    if not plain:
        monkeypatch.setattr(backend, "in_plain_torch", lambda *args: False)
    backend.reset()
    return {"grad_mode": mode}
