"""Networks for tests of anytime inference, and what they give when run plainly."""

import torch

import sorted_kernels as sk
from sorted_kernels import Submodel
from sorted_kernels.inference import anytime
from sorted_kernels.nn import dimensions


class Block(torch.nn.Module):
    """Counts its calls."""

    def __init__(self, width):
        super().__init__()
        self.fc = torch.nn.Linear(width, width)
        self.calls = 0

    def forward(self, h, *rest, **options):
        self.calls += 1
        return h + torch.tanh(self.fc(h))


class Net(torch.nn.Module):
    """Stem, blocks, head; what is special about a network is its ``loop``."""

    def __init__(self, width=6, depth=5):
        super().__init__()
        self.stem = Block(width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 3)

    def prepare(self, x):
        return self.stem(x)

    def loop(self, h):
        for layer in self.layers:
            h = layer(h)
        return h

    def forward(self, x):
        return self.head(self.norm(self.loop(self.prepare(x))))


def elastic(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return sk.elasticize(model, {"layers": {"depth": "depth"}}).eval()


def expected(model, x, depths=None, **sizes):
    """Outputs of plain forwards at each depth."""
    outputs = []
    for depth in depths or range(1, dimensions(model)["depth"] + 1):
        with torch.no_grad(), sk.active(model, Submodel(depth=depth, **sizes)):
            outputs.append(model(x.clone()))
    return outputs


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, Block)]


def calls(model):
    """How often each block has run, the stem first."""
    return [block.calls for block in blocks_of(model)]


def clear_calls(model):
    for block in blocks_of(model):
        block.calls = 0


def assert_exact(model, x, depths=None):
    """Every exit gives, bit for bit, what a plain forward at that depth gives."""
    wanted = expected(model, x, depths=depths)
    clear_calls(model)
    results = list(anytime(model, x, exits=depths))
    assert len(results) == len(wanted)
    for result, output in zip(results, wanted, strict=True):
        assert torch.equal(result.output, output), f"depth {result.depth}"


def leftovers(model):
    """Whatever a run might leave on a model."""
    assert model.layers._playing is None
    return [
        (
            sorted(m.__dict__.keys() - {"_playing"}),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            m.training,
        )
        for m in model.modules()
    ]
