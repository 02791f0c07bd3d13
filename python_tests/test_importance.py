"""sort_by_importance: the same function, the important heads and neurons first."""

import pytest
import torch

import sorted_kernels as sk
from support.pretrained import elastic, inputs, out

LABELLED = ["llama", "mistral", "qwen2", "gpt2", "bert", "roberta", "vit"]


def batches(name, count=2):
    made = []
    for seed in range(count):
        batch = inputs(name, seed)
        ids = batch.get("input_ids")
        made.append({**batch, "labels": torch.tensor([1, 4]) if ids is None else ids})
    return made


def blocks_of(model):
    return next(iter(sk.nn.depth_lists(model).values())).all_blocks()


def losses(model, name, submodel):
    with sk.active(model, submodel), torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches(name))


@pytest.mark.parametrize("name", LABELLED)
def test_the_function_at_full_size_stays(name):
    model, batch = elastic(name).double().train(), inputs(name, 5)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    data = [
        {key: v.double() if v.is_floating_point() else v for key, v in b.items()}
        for b in batches(name)
    ]
    sk.activate(model, sk.Submodel(depth=1))
    before = {path: param.detach().clone() for path, param in model.named_parameters()}
    with sk.active(model, sk.Submodel(depth=3)):
        expected = out(model.eval(), batch)
    model.train()
    sk.models.sort_by_importance(model, data)
    assert model.training and sk.nn.current(model).depth == 1
    assert all(param.grad is None for param in model.parameters())
    moved = {p for p, param in model.named_parameters() if not torch.equal(param, before[p])}
    kinds = ("down_proj", "o_proj", "c_proj", "fc2", "output.dense")
    assert any(path.endswith(tuple(f"{kind}.weight" for kind in kinds)) for path in moved)
    sk.activate(model, sk.Submodel(depth=3))
    found = out(model.eval(), batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for path, param in model.named_parameters():
        torch.testing.assert_close(
            param.detach().flatten().sort().values, before[path].flatten().sort().values
        )
    again = {path: param.detach().clone() for path, param in model.named_parameters()}
    sk.models.sort_by_importance(model, data)  # sorted already
    assert all(torch.equal(param, again[path]) for path, param in model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_does_nothing_comes_last(name):
    """A neuron and a group of heads whose outputs are not used; the rest computes the same."""
    model = elastic(name)
    last = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}
    group = 24 if name == "llama" else 4  # features of a group
    with torch.no_grad():
        for block in blocks_of(model):
            heads, ffn = (block.get_submodule(path).weight for path in last[name])
            heads, ffn = (heads.t(), ffn.t()) if name == "llama" else (heads, ffn)
            heads[:group] = 0
            ffn[:13] = 0
    batch = inputs(name)
    expected = out(model, batch)
    sk.models.sort_by_importance(model, batches(name))
    rest = sk.Submodel(heads=3 if name == "llama" else 5, ffn=27)
    with sk.active(model, rest):
        torch.testing.assert_close(out(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_scores_are_the_losses_of_masking():
    """First-order importance against finite differences of the loss, for every neuron and head."""
    from sorted_kernels.models import importance

    model = elastic("llama").double()
    (batch,) = batches("llama", 1)
    target = torch.randn(2, 7, 50, dtype=torch.float64)

    def loss(model, batch):  # the model's own is computed in float32
        return (model(**batch).logits * target).sum()

    for dimension, unit in (("ffn", 1), ("heads", 8)):
        uses = importance._uses_by_block(model, dimension)
        scores = importance._scores(model, [batch], loss, uses)
        weight = next(use.layer.weight for use in uses[1] if use.side == "in")
        for index, score in enumerate(scores[1].tolist()):
            columns = slice(index * unit, (index + 1) * unit)
            with torch.no_grad():
                kept, found = weight[:, columns].clone(), []
                for factor in (1 + 1e-4, 1 - 1e-4):
                    weight[:, columns] = kept * factor
                    found.append(float(loss(model, batch)))
                weight[:, columns] = kept
            assert abs(found[0] - found[1]) / 2e-4 == pytest.approx(score, rel=1e-3, abs=1e-6)


def test_sorted_prefixes_beat_reversed_ones():
    small = sk.Submodel(ffn=10)
    model = elastic("llama")
    optimizer = sk.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        model(**batches("llama")[step % 2]).loss.backward()
        optimizer.step()
    full = losses(model, "llama", sk.Submodel(depth=3))
    sk.models.sort_by_importance(model, batches("llama"))
    ours = losses(model, "llama", small)
    flip = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    with torch.no_grad():
        for path, module in model.named_modules():
            axis = flip.get(path.rpartition(".")[2])
            if axis is not None:
                module.weight.copy_(module.weight.flip(axis))
    reverse = losses(model, "llama", small)
    assert losses(model, "llama", sk.Submodel(depth=3)) == pytest.approx(full, rel=1e-4)
    assert ours < reverse


def test_a_loss_of_ones_own():
    rules = {
        "blocks": {"depth": "depth"}, "blocks.*.fc1": {"out": "ffn"}, "blocks.*.fc2": {"in": "ffn"}
    }  # fmt: skip
    model = sk.elasticize(sk.models.ResidualMLP(6, 16, 24, 3, 4), rules)
    x = torch.randn(5, 6)
    expected = model(x)
    sk.models.sort_by_importance(
        model, [x], loss=lambda model, x: model(x).square().mean(), order=("ffn",)
    )
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, sk.OptionError, "no batch"),
        ([inputs("llama")], {}, sk.OptionError, "LlamaForCausalLM gave no loss"),
        ([torch.ones(2, 3)], {}, sk.OptionError, "a batch is a Tensor"),
        (batches("llama"), {"order": ("rank",)}, sk.DimensionError, "'rank' is unknown"),
        (batches("llama"), {"order": ("hidden",)}, sk.RuleError, "holds 'hidden'"),
        (batches("llama"), {"loss": lambda m, b: m(**b).loss * torch.nan}, sk.OptionError,
         "not finite"),
    ],
    ids=["no-batch", "no-labels", "no-mapping", "unknown", "not-in-blocks", "nan"],
)  # fmt: skip
def test_errors_change_nothing(data, options, error, message):
    model = elastic("llama").train()
    before = {path: param.detach().clone() for path, param in model.named_parameters()}
    with pytest.raises(error, match=message):
        sk.models.sort_by_importance(model, data, **options)
    assert all(torch.equal(param, before[path]) for path, param in model.named_parameters())
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_groups_and_the_heads_in_them_fall_in_importance():
    from sorted_kernels.models import importance

    model = elastic("llama")
    uses = importance._uses_by_block(model, "heads")
    data, loss = batches("llama"), importance._loss_of_outputs
    sk.models.sort_by_importance(model, data)
    for score in importance._scores(model, data, loss, uses):
        by_group = score.view(2, 3)
        assert by_group.sum(1).diff() < 0
        assert (by_group.diff(dim=1) <= 1e-6).all()
