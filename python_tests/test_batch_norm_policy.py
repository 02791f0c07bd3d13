"""Whose statistics a batch norm uses: shared, one set a width, or measured for a sub-model."""

import copy

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.ops.gradient import staircase_of
from sorted_kernels.training import load_checkpoint, save_checkpoint
from support.poison import assert_same_bits

WIDTHS = (2, 5, 8)
LISTED = [sk.Submodel(w=w) for w in WIDTHS]


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        return x + self.dropout(torch.relu(self.bn(self.fc(x))))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x):
        y = self.bn(self.stem(x))
        for block in self.blocks:
            y = block(y)
        return self.head(y)


RULES = {
    "stem": {"out": "w"}, "bn": {"features": "w"}, "blocks": {"depth": "d"}, "head": {"in": "w"},
    "blocks.*.fc": {"in": "w", "out": "w"}, "blocks.*.bn": {"features": "w"},
}  # fmt: skip


def net(policy="shared", seed=0):
    torch.manual_seed(seed)
    model = sk.elasticize(Net(), RULES, dimensions={"w": 8})
    if policy == "switchable":
        sk.nn.set_batch_norm_policy(model, policy, LISTED)
    return model


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(7, 6, generator=generator) * (2 + i) + i, None) for i in range(count)]


def train(model, submodels=LISTED):
    """Running statistics of every sub-model, each on data of its own."""
    model.train()
    for i, submodel in enumerate(submodels):
        with sk.active(model, submodel):
            for x, _ in batches(4, seed=i):
                model(x)
    return model


def evaluated(model, submodel, x=None):
    model.eval()
    with sk.active(model, submodel), torch.no_grad():
        return model(torch.ones(5, 6).cumsum(0) if x is None else x)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before, but=lambda name: False):
    after = model.state_dict()
    for name, value in before.items():
        if not but(name):
            assert_same_bits(after[name], value)


def bn_inputs(model, submodel, x):
    """What reaches the first batch norm."""
    with sk.active(model, submodel), torch.no_grad():
        return model.stem(x)


def test_shared_statistics_are_moved_by_every_width():
    model = net()
    mean, var = torch.zeros(16), torch.ones(16)
    for i, submodel in enumerate(LISTED):
        for x, _ in batches(4, seed=i):
            y = bn_inputs(model, submodel, x)
            c = y.shape[1]
            mean[:c] = 0.9 * mean[:c] + 0.1 * y.mean(0)
            var[:c] = 0.9 * var[:c] + 0.1 * y.var(0)
    train(model)
    torch.testing.assert_close(model.bn.running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bn.running_var, var, rtol=1e-5, atol=1e-5)
    assert int(model.bn.num_batches_tracked) == 12


@pytest.mark.parametrize("index", range(3), ids=[f"w={w}" for w in WIDTHS])
def test_switchable_sets_are_those_of_a_stand_alone_layer(index):
    """Each width's set has seen that width's batches and nothing else."""
    model, submodel = net("switchable"), LISTED[index]
    alone = torch.nn.BatchNorm1d(2 * submodel.w)
    for x, _ in batches(4, seed=index):
        alone(bn_inputs(model, submodel, x))
    train(model)
    with sk.active(model, submodel):
        found = model.bn.sources()
    for name, value in alone.named_buffers():
        torch.testing.assert_close(found[name], value)
    assert (found["weight"] is model.bn.weight) == (submodel.w == 8)


def test_recalibrated_statistics_are_the_mean_over_the_batches():
    model, submodel = train(net()), sk.Submodel(w=5)
    inputs = [bn_inputs(model, submodel, x) for x, _ in batches(3, seed=9)]
    assert sk.inference.recalibrate(model, submodel, batches(9, seed=9), batches=3) == 3
    model.eval()
    with sk.active(model, submodel):
        found = model.bn.sources()
    mean, var = (torch.stack([f(y) for y in inputs]).mean(0) for f in (mean_of, var_of))
    torch.testing.assert_close(found["running_mean"], mean)
    torch.testing.assert_close(found["running_var"], var)
    assert int(found["num_batches_tracked"]) == 3 and found["weight"] is model.bn.weight


def mean_of(y):
    return y.mean(0)


def var_of(y):
    return y.var(0)


def test_the_three_differ():
    submodel = sk.Submodel(w=5)
    shared, switchable, measured = train(net()), train(net("switchable")), train(net())
    sk.inference.recalibrate(measured, submodel, batches(3, seed=9))
    outputs = [evaluated(model, submodel) for model in (shared, switchable, measured)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-2
    assert_same_bits(evaluated(measured, LISTED[0]), evaluated(shared, LISTED[0]))


def test_an_unlisted_width_is_an_error_that_names_those_listed():
    model = train(net("switchable"))
    before = snapshot(model)
    for training in (True, False):
        model.train(training)
        with (
            sk.active(model, sk.Submodel(w=3)),
            pytest.raises(sk.DimensionError, match=r"6 of 16 channels.* sets are for 4, 10, 16"),
        ):
            model(torch.randn(4, 6))
    with pytest.raises(sk.DimensionError, match="4, 10, 16"):
        sk.export(model, sk.Submodel(w=3))
    assert_unchanged(model, before)
    partial = net()
    sk.nn.set_batch_norm_policy(partial, "switchable", LISTED[:2])
    with pytest.raises(sk.DimensionError, match="16 of 16 .* sets are for 4, 10$"):
        partial(torch.randn(4, 6))


def test_going_back_to_shared():
    model = net()
    before = snapshot(model)
    sk.nn.set_batch_norm_policy(model, "switchable", sk.SubmodelSpace(w=list(WIDTHS), d=[1, 2]))
    assert sorted(model.bn.state_dict())[-1] == "weight"
    assert "bn.switch.10.running_var" in model.state_dict()
    sk.nn.set_batch_norm_policy(model, "shared")
    assert list(model.state_dict()) == list(before)
    train(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sk.nn.set_batch_norm_policy(m, "private"), "allowed are shared, switchable"),
        (lambda m: sk.nn.set_batch_norm_policy(m, "switchable"), "needs at least one"),
        (lambda m: sk.nn.set_batch_norm_policy(m, "shared", LISTED), "takes none"),
        (lambda m: sk.nn.set_batch_norm_policy(m.head, "shared"), "no elastic batch norm"),
        (lambda m: sk.nn.set_batch_norm_policy(m, "switchable", [sk.Submodel(w=9)]), "w=9"),
        (lambda m: sk.inference.recalibrate(m, LISTED[0], []), "loader is empty"),
        (lambda m: sk.inference.recalibrate(m, LISTED[0], batches(), batches=0), "batches=0"),
        (lambda m: sk.inference.recalibrate(m.head, LISTED[0], batches()), "no elastic batch"),
        (lambda m: sk.inference.recalibrate(m, sk.Submodel(w=9), batches()), "w=9"),
        (lambda m: sk.inference.recalibrate(m, LISTED[0], [torch.ones(3)]), "inputs, targets"),
    ],
)
def test_errors_change_nothing(call, message):
    model = train(net())
    before = snapshot(model)
    with pytest.raises((sk.OptionError, sk.DimensionError), match=message):
        call(model)
    assert list(model.state_dict()) == list(before)
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert sk.nn.current(model) == sk.Submodel(d=2, w=8)


@pytest.mark.parametrize("policy", ["shared", "switchable"])
def test_recalibration_touches_nothing_else(policy):
    model = train(net(policy))
    model.blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    sk.activate(model, sk.Submodel(w=2, d=1))
    before = snapshot(model)
    outputs = []
    hook = model.blocks[0].dropout.register_forward_hook(lambda m, a, y: outputs.append((a[0], y)))
    sk.inference.recalibrate(model, sk.Submodel(w=5), batches())
    hook.remove()
    assert all(torch.equal(x, y) for x, y in outputs)  # no dropout
    assert_unchanged(model, before)
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in modes} == modes
    assert sk.nn.current(model) == sk.Submodel(w=2, d=1)
    assert sk.nn.recalibrated(model) == ["w=5"]


def test_several_submodels_are_switched_among():
    model = train(net())
    submodels = [sk.Submodel(w=2), sk.Submodel(w=5), sk.Submodel(w=5, d=1), sk.Submodel(w=8, d=2)]
    plain = [evaluated(model, submodel) for submodel in submodels]
    alone = []
    for submodel in submodels:
        single = copy.deepcopy(model)
        sk.inference.recalibrate(single, submodel, batches(4, seed=3))
        alone.append(evaluated(single, submodel))
    for submodel in submodels:
        sk.inference.recalibrate(model, submodel, batches(4, seed=3))
    assert sk.nn.recalibrated(model) == ["d=1,w=5", "full", "w=2", "w=5"]
    assert "blocks.1.bn.recalibrated.d=1,w=5.running_mean" not in model.state_dict()
    for _ in range(2):
        for submodel, right, old in zip(submodels, alone, plain, strict=True):
            found = evaluated(model, submodel)
            assert_same_bits(found, right)
            assert (found - old).abs().max() > 1e-3
    sk.nn.forget_recalibrated(model)
    for submodel, old in zip(submodels, plain, strict=True):
        assert_same_bits(evaluated(model, submodel), old)


def test_training_moves_the_shared_statistics_only():
    model, submodel = train(net()), sk.Submodel(w=5)
    sk.inference.recalibrate(model, submodel, batches())
    before = snapshot(model)
    train(model, [submodel])
    assert_unchanged(model, before, but=lambda name: ".recalibrated." not in name)
    assert not torch.equal(model.bn.running_mean, before["bn.running_mean"])
    assert torch.equal(model.bn.running_mean[10:], before["bn.running_mean"][10:])


def test_a_failed_recalibration_keeps_the_earlier_statistics():
    model, submodel = train(net()), sk.Submodel(w=5)
    sk.inference.recalibrate(model, submodel, batches())
    before = snapshot(model)

    def broken():
        yield batches()[0]
        raise KeyError("no more")

    for loader, error in ((broken(), KeyError), ([(torch.ones(1, 6), None)], sk.ShapeError)):
        with pytest.raises(error):
            sk.inference.recalibrate(model, submodel, loader)
        assert list(model.state_dict()) == list(before)
        assert_unchanged(model, before)
        assert model.training and not model.bn.calibrating
    sk.inference.recalibrate(model, submodel, batches(2, seed=5))
    assert not torch.equal(
        model.state_dict()["bn.recalibrated.w=5.running_mean"],
        before["bn.recalibrated.w=5.running_mean"],
    )


def prepared(kind):
    """A trained model of each kind, and its twin that has not been trained."""
    model, fresh = (net("switchable" if kind == "switchable" else "shared", s) for s in (0, 1))
    train(model)
    if kind == "recalibrated":
        for submodel in (*LISTED, sk.Submodel(d=1, w=5)):
            sk.inference.recalibrate(model, submodel, batches())
    return model, fresh


kinds = pytest.mark.parametrize("kind", ["shared", "switchable", "recalibrated"])


@kinds
@pytest.mark.parametrize("way", ["checkpoint", "state_dict"])
def test_saved_and_loaded(kind, way, tmp_path):
    model, fresh = prepared(kind)
    if way == "checkpoint":
        pytest.importorskip("safetensors")
        save_checkpoint(tmp_path, 1, model=model)
        load_checkpoint(tmp_path, model=fresh)
    else:
        fresh.load_state_dict(model.state_dict())
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert_unchanged(fresh, snapshot(model))
    for submodel in (*LISTED, sk.Submodel(d=1, w=5)):
        assert_same_bits(evaluated(fresh, submodel), evaluated(model, submodel))


def test_loading_forgets_statistics_of_other_weights():
    model, other = prepared("recalibrated")
    model.load_state_dict(other.state_dict())
    assert sk.nn.recalibrated(model) == []


@pytest.mark.parametrize(("saved", "given"), [("shared", "switchable"), ("switchable", "shared")])
def test_another_policy_is_an_error(saved, given, tmp_path):
    pytest.importorskip("safetensors")
    model, other = train(net(saved)), net(given)
    before = snapshot(other)
    save_checkpoint(tmp_path, 1, model=model)
    with pytest.raises(sk.CheckpointError, match=r"'bn': \[4, 10, 16\].*set_batch_norm_policy"):
        load_checkpoint(tmp_path, model=other)
    with pytest.raises(RuntimeError, match=r"bn\.switch\.4\.running_mean"):
        copy.deepcopy(other).load_state_dict(model.state_dict())
    assert_unchanged(other, before)


def test_recalibrated_statistics_that_do_not_fit_are_an_error(tmp_path):
    pytest.importorskip("safetensors")
    model, _ = prepared("recalibrated")
    save_checkpoint(tmp_path, 1, model=model)
    fresh = net()
    fresh.bn = sk.nn.BatchNorm1d(16, track_running_stats=False, dim="w")
    sk.nn.activation.forget_plan(fresh)
    with pytest.raises(sk.CheckpointError, match="no running statistics"):
        load_checkpoint(tmp_path, model=fresh)
    state = dict(model.bn.state_dict())
    state["recalibrated.w=5.running_mean"] = torch.zeros(17)
    with pytest.raises(RuntimeError, match="has 17 channels; allowed are 1 to 16"):
        net().bn.load_state_dict(state)


@kinds
@pytest.mark.parametrize("submodel", [*LISTED, sk.Submodel(d=1, w=5)], ids=str)
def test_export_takes_what_is_in_force(kind, submodel):
    model, _ = prepared(kind)
    for training in (True, False):
        plain = sk.export(model.train(training), submodel)
        assert plain.training == training
        assert {type(m).__module__.split(".")[0] for m in plain.modules()} <= {"torch", __name__}
        x = torch.randn(5, 6)
        assert_same_bits(plain.eval()(x), evaluated(model, submodel, x))
        assert set(plain.state_dict()) <= set(net().state_dict())
        counted = sk.count_parameters(model, submodel)
        assert counted == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("make", [sk.optim.SGD, torch.optim.SGD])
def test_optimizers_see_switchable_parameters(make):
    model = net("switchable")
    sets = [model.bn.weight, model.bn.switch["4"].weight, model.bn.switch["10"].weight]
    optimizer = make(model.parameters(), lr=0.1)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(param) for param in sets} <= known
    before = [param.clone() for param in sets]
    sk.activate(model, LISTED[1])
    model(torch.randn(5, 6)).square().sum().backward()
    assert staircase_of(sets[2]).area == 10 and sets[0].grad is None and sets[1].grad is None
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(sets, before, strict=True)]
    assert moved == [False, False, True]


def test_switchable_training_equals_stand_alone_networks():
    """With sets of its own for each width, one step is that of the exported network."""
    for submodel in LISTED:
        model = net("switchable")
        plain = sk.export(model, submodel)
        x = torch.randn(5, 6)
        model.eval()  # no dropout; its batch norms train
        for module in (*plain.eval().modules(), *model.modules()):
            if isinstance(module, torch.nn.BatchNorm1d):
                module.train()
        with sk.active(model, submodel):
            y = model(x)
            y.square().sum().backward()
            found = model.bn.sources()
        expected = plain(x)
        expected.square().sum().backward()
        assert_same_bits(y, expected)
        assert_same_bits(found["weight"].grad, plain.bn.weight.grad)
        assert_same_bits(found["running_var"], plain.bn.running_var)


@kinds
def test_compiled_models_use_the_same_statistics(kind):
    torch._dynamo.reset()
    model, _ = prepared(kind)
    compiled = torch.compile(model.eval(), backend="aot_eager")
    x = torch.randn(5, 6)
    for submodel in (*LISTED[:2], LISTED[0]):
        with sk.active(model, submodel), torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


@kinds
def test_copies_have_sets_of_their_own(kind):
    model, _ = prepared(kind)
    before = snapshot(model)
    other = copy.deepcopy(model)
    sk.inference.recalibrate(other, LISTED[1], batches(2, seed=7))
    train(other)
    assert list(model.state_dict()) == list(before)
    assert_unchanged(model, before)
    assert (evaluated(other, LISTED[1]) - evaluated(model, LISTED[1])).abs().max() > 1e-3
