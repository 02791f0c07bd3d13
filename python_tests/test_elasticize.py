"""elasticize: what it keeps, what rules match, and that an error leaves the model as it was."""

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.models import RESIDUAL_MLP_RULES, ResidualMLP
from sorted_kernels.nn.layers import ElasticModule


def mlp():
    torch.manual_seed(0)
    return ResidualMLP(6, 16, 24, 3, 4)


def snapshot(model):
    return [
        (name, type(module), dict(module.__dict__), dict(module._parameters))
        for name, module in model.named_modules()
    ]


def test_class_parameters_keys_and_output_stay():
    model = mlp()
    x = torch.randn(5, 6)
    before, y = dict(model.named_parameters()), model(x)
    keys, buffers = list(model.state_dict()), list(model.buffers())
    assert sk.elasticize(model, RESIDUAL_MLP_RULES, dimensions={"width": 8}) is model
    assert type(model) is ResidualMLP and list(model.state_dict()) == keys
    assert all(param is before[name] for name, param in model.named_parameters())
    assert list(model.buffers()) == buffers
    assert torch.equal(model(x), y)


def test_swapped_modules_are_the_elastic_ones():
    model = sk.elasticize(mlp(), RESIDUAL_MLP_RULES, dimensions={"width": 8})
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name}
    assert type(model.blocks) is sk.nn.ModuleList and type(model.norm) is sk.nn.LayerNorm
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            assert isinstance(module, ElasticModule), name
            assert type(module).__module__.startswith("sorted_kernels.nn")
    assert kinds["blocks.0"] == "ResidualBlock"


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("blocks.*.fc1", {"blocks.0.fc1", "blocks.1.fc1", "blocks.2.fc1"}),
        ("blocks.1.fc1", {"blocks.1.fc1"}),
        ("**.fc1", {"blocks.0.fc1", "blocks.1.fc1", "blocks.2.fc1"}),
        ("blocks.**.fc1", {"blocks.0.fc1", "blocks.1.fc1", "blocks.2.fc1"}),
        ("*.*.fc*", {f"blocks.{i}.fc{j}" for i in range(3) for j in (1, 2)}),
        ("st*", {"stem"}),
        ("*em", {"stem"}),
    ],
)
def test_wildcards(pattern, matched):
    model = sk.elasticize(mlp(), {pattern: {"in": "d"}}, dimensions={"d": 4})
    assert {n for n, m in model.named_modules() if isinstance(m, ElasticModule)} == matched


def test_a_dot_is_no_wildcard():
    model = torch.nn.ModuleDict({"axb": torch.nn.Linear(3, 3), "a": torch.nn.ModuleDict()})
    model["a"]["b"] = torch.nn.Linear(3, 3)
    sk.elasticize(model, {"a.b": {"out": "w"}})
    assert type(model["axb"]) is torch.nn.Linear and type(model["a"]["b"]) is sk.nn.Linear


def test_the_model_itself_can_be_the_module():
    layer = torch.nn.Linear(8, 6)
    sk.elasticize(layer, {"": {"out": "w"}})
    sk.activate(layer, sk.Submodel(w=2))
    assert type(layer) is sk.nn.Linear and layer(torch.randn(3, 8)).shape == (3, 2)


def test_rules_for_one_module_add_up():
    model = mlp()
    sk.elasticize(
        model, {"stem": {"out": "w"}, "st*": {"in": "x", "out": "w"}, "head": {"out": "c"}}
    )
    assert sk.nn.dimensions(model) == {"x": 6, "w": 16, "c": 4}


def test_a_second_call_adds_dimensions():
    model = mlp()
    rules = dict(RESIDUAL_MLP_RULES)
    depth = {"blocks": rules.pop("blocks")}
    sk.elasticize(model, rules, dimensions={"width": 8})
    sk.activate(model, sk.Submodel(width=3))
    sk.elasticize(model, depth, dimensions={"width": 8})
    assert sk.nn.dimensions(model) == {"width": 8, "depth": 3}
    assert sk.nn.current(model) == sk.Submodel(width=3, depth=3)
    sk.activate(model, sk.Submodel(width=8, depth=1))
    assert model(torch.randn(5, 6)).shape == (5, 4)


def test_embedding_and_sequential():
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 8), torch.nn.RMSNorm(8), torch.nn.Linear(8, 3)
    )
    sk.elasticize(model, {"0": {"features": "w"}, "1": {"features": "w"}, "2": {"in": "w"}})
    sk.activate(model, sk.Submodel(w=5))
    assert model(torch.tensor([1, 2])).shape == (2, 3)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 8)
        self.head = torch.nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight
        self.conv = torch.nn.Conv1d(3, 3, 1)

    def forward(self, x):
        return self.head(self.embed(x))


def test_tied_weights_cut_alike():
    model = sk.elasticize(Tied(), {"embed": {"features": "w"}, "head": {"in": "w"}})
    assert model.head.weight is model.embed.weight
    sk.activate(model, sk.Submodel(w=3))
    assert model(torch.tensor([1, 2])).shape == (2, 5)


GOOD = {"stem": {"out": "w"}, "blocks": {"depth": "d"}}
WRONG = {
    "no-rules": (mlp, {}, {}, "no rules"),
    "matches-nothing": (mlp, {"blocks.*.fc9": {"in": "w"}}, {}, r"'blocks\.\*\.fc9' matches no m"),
    "unknown-axis": (mlp, {"stem": {"rows": "w"}}, {}, r"axis 'rows' of stem.*allowed are in, out"),
    "axis-of-another-kind": (mlp, {"norm": {"in": "w"}}, {}, r"axis 'in' of norm.*features"),
    "no-elastic-form": (Tied, {"conv": {"in": "w"}}, {}, r"conv, a Conv1d.*torch\.nn\.Linear"),
    "contradiction": (
        mlp, {"stem": {"out": "w"}, "st*": {"out": "v"}}, {},
        r"'st\*' ties stem\.out to 'v', another rule to 'w'",
    ),
    "axes-disagree": (
        mlp, {"stem": {"out": "w"}, "blocks.*.fc1": {"out": "w"}}, {},
        r"'w' disagree.*stem\.out has 16, blocks\.0\.fc1\.out has 24",
    ),
    "declared-but-unused": (mlp, GOOD, {"dimensions": {"w": 4, "z": 3}}, r"\['z'\] are declared"),
    "tied-cut-differently": (
        Tied, {"embed": {"features": "w"}, "head": {"in": "w", "out": "v"}}, {},
        "head and embed share a weight, but cut it differently",
    ),
    "grad-mode": (mlp, GOOD, {"grad_mode": "sparse"}, r"grad_mode='sparse'; allowed are in"),
    "multiple-of-zero": (mlp, {"stem": {"out": ("w", 0)}}, {}, r"multiple_of=0 is not in 1\.\.16"),
    "multiple-too-large": (mlp, {"stem": {"out": ("w", 17)}}, {}, r"multiple_of=17 is not"),
    "norm-of-two-axes": (
        lambda: torch.nn.ModuleList([torch.nn.LayerNorm((3, 4))]), {"0": {"features": "w"}}, {},
        r"normalized_shape=\(3, 4\).*exactly one",
    ),
    "embedding-max-norm": (
        lambda: torch.nn.ModuleList([torch.nn.Embedding(3, 4, max_norm=1.0)]),
        {"0": {"features": "w"}}, {}, "0 uses max_norm",
    ),
    "already-elastic": (
        lambda: torch.nn.ModuleList([sk.nn.Linear(3, 4, in_dim="w")]), {"0": {"out": "w"}}, {},
        r"0, .*Linear, which",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("elastic_before", [False, True], ids=["plain", "elastic"])
def test_errors_leave_the_model_as_it_was(case, elastic_before):
    make, rules, options, message = WRONG[case]
    model = make()
    if elastic_before and isinstance(model, ResidualMLP):
        sk.elasticize(model, {"blocks.*.norm": {"features": "n"}}, dimensions={"n": 8})
        sk.activate(model, sk.Submodel(n=8))
    before = snapshot(model)
    with pytest.raises(sk.RuleError, match=message):
        sk.elasticize(model, rules, **options)
    assert snapshot(model) == before
    if isinstance(model, ResidualMLP):
        assert model(torch.randn(5, 6)).shape == (5, 4)
        if elastic_before:
            assert sk.nn.dimensions(model) == {"n": 8}
        else:
            sk.elasticize(model, GOOD)


def test_dense_grad_mode_reaches_the_layers():
    model = sk.elasticize(mlp(), GOOD, grad_mode="dense")
    assert model.stem.grad_mode == "dense"
    model(torch.randn(5, 6)).sum().backward()
    assert model.stem.weight.grad is not None
