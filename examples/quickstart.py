"""The README's examples, whole: operations on a slice, a layer, and a model made elastic.

python examples/quickstart.py
"""

from __future__ import annotations

import torch

import sorted_kernels as sk
from sorted_kernels.data import digits
from sorted_kernels.models import ResidualMLP


def operations() -> None:
    weight = torch.randn(3072, 768, requires_grad=True)
    x = torch.randn(32, 192)  # 192 of 768 features
    y = sk.linear(x, weight, out_features=1000, activation="gelu")  # weight[:1000, :192]
    y.backward(torch.randn_like(y))
    assert not weight.grad[1000:].any() and not weight.grad[:, 192:].any()

    layer = sk.nn.Linear(768, 3072, in_dim="hidden", out_dim="ffn")
    optimizer = sk.optim.AdamW(layer.parameters(), lr=1e-3)
    sk.activate(layer, sk.Submodel(hidden=192, ffn=1000))
    layer(x).sum().backward()  # written straight into grad[:1000, :192]
    optimizer.step()  # moves that block only


def training(epochs: int = 3) -> torch.nn.Module:
    model = ResidualMLP()  # plain PyTorch
    rules = {
        "stem": {"out": "width"},
        "blocks": {"depth": "depth"},
        "blocks.*.norm": {"features": "width"},
        "blocks.*.fc1": {"in": "width", "out": "width"},
        "blocks.*.fc2": {"in": "width", "out": "width"},
        "norm": {"features": "width"},
        "head": {"in": "width"},
    }
    sk.elasticize(model, rules, dimensions={"width": 8})
    space = sk.SubmodelSpace(depth=range(1, 13), width=range(1, 9))
    data = digits()
    loader = data.train_loader(64)
    optimizer = sk.optim.AdamW(model.parameters(), lr=2e-3)
    sk.training.fit(model, sk.training.Stochastic(space), loader, optimizer, epochs=epochs)
    results = sk.inference.evaluate(model, space, data.test_loader())
    best = sk.inference.select(results, min_recovery=99)
    print(f"cheapest within 99% of the best: {best.submodel}, {100 * best.metric:.1f}%")
    small = sk.export(model, best.submodel)  # a plain torch module
    with sk.active(model.eval(), best.submodel):
        torch.testing.assert_close(small.eval()(data.test_inputs), model(data.test_inputs))

    for exit_ in sk.inference.anytime(model, data.test_inputs):
        right = (exit_.output.argmax(-1) == data.test_targets).float().mean()
        print(f"depth {exit_.depth}: {100 * right:.1f}% after {exit_.elapsed_ms:.1f} ms")
    return small


if __name__ == "__main__":
    operations()
    training()
