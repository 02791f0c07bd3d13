"""This library's attention through the interface of ``transformers``."""

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels import ops
from sorted_kernels.models.architectures import attention
from support.pretrained import (
    DECODERS,
    ENCODERS,
    VOCABULARY,
    inputs,
    out,
    plain,
    submodel,
    transformers,
)


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


def padded(length=9):
    """Tokens of which the first row begins with three that do not count."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.fixture
def grouped_calls(monkeypatch):
    """What the library's attention is called with: heads, KV heads, queries, keys."""
    calls = []

    def counted(q, k, v, **options):
        calls.append((q.shape[1], k.shape[1], q.shape[2], k.shape[2]))
        return run(q, k, v, **options)

    run = ops.attention
    monkeypatch.setattr(ops, "attention", counted)
    return calls


CACHES = {
    "dynamic": lambda model: transformers.DynamicCache(config=model.config),
    "static": lambda model: transformers.StaticCache(config=model.config, max_cache_len=12),
}


@pytest.mark.parametrize("padding", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_llama_reads_in_chunks_through_a_cache(kind, padding, grouped_calls):
    """Grouped heads of a sub-model; logits as of PyTorch's attention over all tokens at once."""
    chosen = sk.Submodel(hidden=20, heads=3, ffn=17, depth=2)
    model = sk.elasticize(plain("llama"))
    sk.activate(model, chosen)
    ids, mask = padded()
    mask = mask if padding else torch.ones_like(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    model.set_attn_implementation("sorted_kernels")
    cache, found, start = CACHES[kind](model), [], 0
    for end in (4, 7, 8, 9):
        step = slice(start, end)
        output = model(
            input_ids=ids[:, step],
            attention_mask=mask[:, :end] if padding else None,
            position_ids=positions[:, step],
            past_key_values=cache,
        )
        found.append(output.logits)
        start = end
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[seen], expected[seen])
    assert len(grouped_calls) == 4 * chosen.depth
    assert {call[:2] for call in grouped_calls} == {(3, 1)}
    assert [call[2] for call in grouped_calls[:: chosen.depth]] == [4, 3, 1, 1]


@pytest.mark.parametrize("padding", [True, False], ids=["padding", "no padding"])
def test_a_llama_learns_the_same(padding, grouped_calls):
    ids, mask = padded()
    model = sk.elasticize(plain("llama")).train()
    sk.activate(model, sk.Submodel(hidden=20, heads=3, ffn=17, depth=2))
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    if padding:
        batch["attention_mask"] = mask
    gradients = []
    for implementation in ("sdpa", "sorted_kernels"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert len(grouped_calls) == 2 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_without_attention_nothing_is_registered(monkeypatch):
    monkeypatch.delattr(ops, "attention", raising=False)
    assert attention.register_attention() is False


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"softcap": 3.0}])
def test_what_it_cannot_do(options):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(sk.OptionError, match=next(iter(options))):
        attention.attend(None, q, q, q, None, **options)
