"""Tables of architectures: one's own, and what a table does not say."""

from pathlib import Path

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.models.architectures import registry


@pytest.fixture(autouse=True)
def _tables(monkeypatch):
    monkeypatch.setattr(registry, "_TABLES", dict(registry._TABLES))


class ScaledNorm(torch.nn.Module):
    """A norm that the library does not know."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size))
        self.tiny = 1e-3

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.tiny).sqrt() * self.weight


class Block(torch.nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.norm = ScaledNorm(size)
        self.inner = inner
        self.up = torch.nn.Linear(size, 2 * inner)
        self.down = torch.nn.Linear(inner, size)

    def forward(self, x):
        left, right = self.up(self.norm(x)).split(self.inner, -1)
        return x + self.down(left * right)


class Body(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            Block(config.size, config.inner) for _ in range(config.depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Config:
    def __init__(self, **fields):
        self.__dict__.update(fields)

    def to_dict(self):
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, fields):
        if fields["size"] % 2:
            raise TypeError("size must be even")
        return cls(**fields)


class OwnNet(torch.nn.Module):
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.body = Body(config)
        self.head = torch.nn.Linear(config.size, 3)
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.head(self.body(x)) * self.temperature


class DerivedNet(OwnNet):
    pass


def net(kind=OwnNet):
    return kind(Config(size=8, inner=6, depth=3))


TABLE = {
    "rules": lambda config: {
        "blocks": {"depth": "depth"},
        "blocks.*.norm": {"features": "size"},
        "blocks.*.up": {"in": "size"},
        "blocks.*.down": {"out": "size"},
        "blocks.*.missing": {"out": "size"},
    },
    "heads": {"head": {"in": "size"}, "other_head": {"in": "size"}},
    "configuration": lambda config, sizes: dict(sizes),
    "forms": {
        "ScaledNorm": sk.models.Form(
            sk.nn.RMSNorm,
            lambda path, module: {
                "normalized_shape": (len(module.weight),),
                "eps": module.tiny,
                "elementwise_affine": True,
            },
        )
    },
    "fixed": ("",),
}


@pytest.mark.parametrize("kind", [OwnNet, DerivedNet])
def test_a_table_of_ones_own(kind):
    with pytest.raises(sk.RuleError, match="OwnNet|DerivedNet"):
        sk.elasticize(net(kind))
    sk.models.register_architecture("OwnNet", "AnotherNet", **TABLE)
    model, x = net(kind), torch.randn(4, 8)
    expected = model(x)
    sk.elasticize(model)
    torch.testing.assert_close(model(x), expected)
    assert sk.nn.dimensions(model) == {"depth": 3, "size": 8}
    small = sk.export(model, sk.Submodel(depth=2, size=4))
    assert type(small) is kind and small.config.size == 4 and len(small.body.blocks) == 2
    assert type(small.body.blocks[0].norm) is ScaledNorm
    with sk.active(model, sk.Submodel(depth=2, size=4)):
        torch.testing.assert_close(model(x[:, :4]), small(x[:, :4]))
    with pytest.raises(sk.DimensionError, match="Config cannot say .*size=3.*must be even"):
        sk.export(model, sk.Submodel(size=3))


def test_a_configuration_of_other_sizes_is_an_error():
    broken = {**TABLE, "configuration": lambda config, sizes: {**sizes, "size": 8}}
    sk.models.register_architecture("OwnNet", **broken)
    model = sk.elasticize(net())
    with pytest.raises(sk.DimensionError, match="size mismatch"):
        sk.export(model, sk.Submodel(size=4))
    assert sk.nn.current(model).size == 8


def test_without_a_configuration_modules_are_copied():
    sk.models.register_architecture("OwnNet", **{**TABLE, "configuration": None})
    model, x = sk.elasticize(net()), torch.randn(4, 8)
    small = sk.export(model, sk.Submodel(depth=1, size=5))
    with sk.active(model, sk.Submodel(depth=1, size=5)):
        torch.testing.assert_close(small(x[:, :5]), model(x[:, :5]))
    assert not any(name.startswith("_elastic") for name in small.__dict__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed": ()}, "the model, a OwnNet, has parameters .temperature. that the table"),
        ({"forms": {}}, "body.blocks.0.norm, a ScaledNorm, which has no elastic form"),
        ({"heads": {}}, "head, a Linear, has parameters .weight, bias."),
        ({"dimensions": lambda config: {"size": 8, "rank": 2}}, r"\['rank'\] are declared"),
    ],
    ids=["own-parameter", "no-form", "unmentioned-head", "unused-dimension"],
)
def test_what_a_table_cannot_express(change, message):
    sk.models.register_architecture("OwnNet", **{**TABLE, **change})
    model = net()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    with pytest.raises(sk.RuleError, match=message):
        sk.elasticize(model)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before


def test_sizes_that_modules_keep_as_attributes():
    """``split(self.inner)`` follows the dimension; the packed projection needs care of its own."""
    config = Config(size=8, inner=6, depth=2)
    body = Body(config)
    sk.elasticize(body, {"blocks.*.down": {"in": "inner"}, "blocks.*": {"inner": "inner"}})
    sk.activate(body, sk.Submodel(inner=4))
    assert [block.inner for block in body.blocks] == [4, 4]
    sk.activate(body, sk.Submodel(inner=6))
    assert [block.inner for block in body.blocks] == [6, 6]
    with pytest.raises(sk.RuleError, match=r"blocks\.0, a Block, which has no elastic form"):
        sk.elasticize(Body(config), {"blocks.*": {"outer": "inner"}})


TABLES = Path(registry.__file__).parent
MECHANISM = {"__init__.py", "attention.py", "common.py", "registry.py"}
FORMULAS = {"mobilenet_v2.py"}  # beside a table, the channels of each width: no transformer's


@pytest.mark.parametrize(
    "path", sorted(p for p in TABLES.glob("*.py") if p.name not in MECHANISM), ids=lambda p: p.name
)
def test_a_table_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines < (200 if path.name in FORMULAS else 40), f"{path.name} has {lines} lines"
