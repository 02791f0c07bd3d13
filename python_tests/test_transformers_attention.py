"""This library's attention through the interface of ``transformers``."""

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels import ops
from sorted_kernels.models.architectures import attention
from support.pretrained import DECODERS, ENCODERS, inputs, out, plain, submodel


def naive_attention(q, k, v, *, causal=False, mask=None, scale=None):
    """The contract of ``sk.attention``, as arithmetic."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        rows, cols = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(rows, cols).triu(1).bool(), -torch.inf)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        )
    return scores.softmax(-1).nan_to_num() @ v


OURS = {"by-contract": naive_attention}
if callable(getattr(ops, "attention", None)):
    OURS["ours"] = ops.attention


@pytest.mark.parametrize("function", OURS.values(), ids=OURS)
@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit"])
def test_models_compute_the_same(name, function, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args[0].shape[1])
        return function(*args, **options)

    monkeypatch.setattr(ops, "attention", counted, raising=False)
    model, batch = sk.elasticize(plain(name)), inputs(name)
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :3] = 0
    chosen = submodel(name, 1)
    sk.activate(model, chosen)
    expected = out(model, batch)
    model.set_attn_implementation("sorted_kernels")
    found = out(model, batch)
    assert calls == [chosen.heads] * chosen.depth
    seen = batch.get("attention_mask", torch.ones(2, 1)).bool()
    seen = seen if found.shape[:2] == seen.shape else slice(None)
    torch.testing.assert_close(found[seen], expected[seen])
    if name not in ENCODERS:
        options = {"max_new_tokens": 4, "do_sample": False}
        ours = model.generate(**batch, **options)
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model.generate(**batch, **options))


def test_without_attention_nothing_is_registered(monkeypatch):
    monkeypatch.delattr(ops, "attention", raising=False)
    assert attention.register_attention() is False


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"softcap": 3.0}])
def test_what_it_cannot_do(options):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(sk.OptionError, match=next(iter(options))):
        attention.attend(None, q, q, q, None, **options)
