"""The three ways a layer's gradient can take."""

import pytest

from sorted_kernels.ops import backend

ROUTES = {
    "leaf": ("inplace", 1 << 40),  # autograd's own node, its result copied into the prefix
    "node": ("inplace", 0),  # a Python node that writes the prefix
    "dense": ("dense", 0),  # the pure path
}
routes = pytest.mark.parametrize("route", ROUTES)
in_place_routes = pytest.mark.parametrize("route", ["leaf", "node"])


def take(monkeypatch, route):
    """Force a route; returns the layer option that it needs."""
    mode, elements = ROUTES[route]
    monkeypatch.setattr(backend, "LEAF_ELEMENTS", elements)
    return {"grad_mode": mode}
