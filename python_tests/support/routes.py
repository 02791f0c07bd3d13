"""The ways that a layer's gradient can take."""

import pytest

from sorted_kernels.ops import backend

ROUTES = {
    "leaf": ("inplace", 1 << 40, True),  # autograd's own node, its result copied into the prefix
    "block": ("inplace", 0, True),  # a lean node of linear's, which writes the prefix
    "node": ("inplace", 0, False),  # the node that calls the back end, as for kernels of ours
    "dense": ("dense", 0, False),  # the pure path
}
routes = pytest.mark.parametrize("route", ROUTES)
in_place_routes = pytest.mark.parametrize("route", ["leaf", "block", "node"])


def take(monkeypatch, route):
    """Force a route; returns the layer option that it needs."""
    mode, elements, plain = ROUTES[route]
    monkeypatch.setattr(backend, "LEAF_ELEMENTS", elements)
    if not plain:
        monkeypatch.setattr(backend, "in_plain_torch", lambda *args: False)
    backend.reset()
    return {"grad_mode": mode}
