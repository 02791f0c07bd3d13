"""Models of ``transformers`` made elastic by their tables: what stays, and every sub-model."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.nn.layers import ElasticModule
from sorted_kernels.nn.parameters import parts_of
from sorted_kernels.ops.gradient import staircase_of
from support import pretrained
from support.pretrained import DECODERS, GROUPED, MODELS, elastic, inputs, out, plain, submodel

transformers = pretrained.transformers
each_model = pytest.mark.parametrize("name", MODELS)
each_decoder = pytest.mark.parametrize("name", DECODERS)


def active_masks(model):
    """What of each parameter the active sub-model has: a mask by ``id``."""
    masks = {}
    inactive = tuple(sk.models.configured._inactive_paths(model))
    for path, module in model.named_modules(remove_duplicate=False):
        if f"{path}.".startswith(inactive):
            continue
        for name, param in module._parameters.items():
            if param is not None:
                mask = masks.setdefault(id(param), torch.zeros_like(param, dtype=torch.bool))
                parts = parts_of(module)
                if isinstance(module, ElasticModule):
                    module.active_view(name, mask).fill_(True)
                elif parts is not None:
                    parts.view(name, mask).fill_(True)
                else:
                    mask.fill_(True)
    return masks


@each_model
def test_what_stays_at_full_size(name):
    model = plain(name)
    kind, keys, params = type(model), list(model.state_dict()), dict(model.named_parameters())
    batch = inputs(name)
    before = out(model, batch)
    assert sk.elasticize(model) is model
    assert type(model) is kind and list(model.state_dict()) == keys
    assert all(param is params[path] for path, param in model.named_parameters())
    torch.testing.assert_close(out(model, batch), before)


@each_model
@pytest.mark.parametrize("seed", range(3))
def test_a_submodel_is_its_export(name, seed):
    model, chosen, batch = elastic(name), submodel(name, seed), inputs(name, seed)
    small = sk.export(model, chosen)
    assert type(small) is type(model) and not any(
        isinstance(module, ElasticModule) for module in small.modules()
    )
    assert sk.count_parameters(model, chosen) == sum(p.numel() for p in small.parameters())
    with sk.active(model, chosen):
        torch.testing.assert_close(out(model, batch), out(small, batch))
        masks = active_masks(model)
    assert sum(int(mask.sum()) for mask in masks.values()) == sk.count_parameters(model, chosen)


@each_model
def test_nothing_outside_is_read_or_written(name):
    model, chosen, batch = elastic(name), submodel(name, 1), inputs(name)
    small = sk.export(model, chosen)
    sk.activate(model, chosen)
    masks = active_masks(model)
    with torch.no_grad():
        for param in model.parameters():
            mask = masks.get(id(param), torch.zeros_like(param, dtype=torch.bool))
            param[~mask] = torch.nan
    for each in (model, small):
        found = [t for t in each(**batch).to_tuple() if torch.is_tensor(t)]
        generator = torch.Generator().manual_seed(0)
        sum((t * torch.randn(t.shape, generator=generator)).sum() for t in found).backward()
    sk.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, eps=1.0).step()
    torch.optim.AdamW(small.parameters(), lr=0.1, weight_decay=0.1, eps=1.0).step()
    expected = dict(small.named_parameters())
    for path, param in model.named_parameters():
        mask = masks.get(id(param), torch.zeros_like(param, dtype=torch.bool))
        assert param[~mask].isnan().all() and param[mask].isfinite().all(), path
        if path not in expected:
            assert param.grad is None, path
            continue
        twin = expected[path]
        torch.testing.assert_close(param.grad[mask].view(twin.shape), twin.grad)
        assert not param.grad[~mask].any(), path
        assert staircase_of(param).area == mask.sum(), path
        torch.testing.assert_close(param[mask].view(twin.shape), twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in DECODERS if name.startswith(GROUPED)])
def test_sizes_by_block(name):
    """Not what a configuration can say: compared block by block with uniform exports."""
    model, batch = elastic(name), inputs(name)
    sizes = {"depth": 2, "hidden": 12, "heads": (3, 6), "ffn": (7, 30)}
    sk.activate(model, sk.Submodel(**sizes))
    mixed = out(model, batch)
    small = sk.export(model, sk.Submodel(depth=2, hidden=12, heads=3, ffn=7))
    other = sk.export(model, sk.Submodel(depth=2, hidden=12, heads=6, ffn=30))
    small.model.layers[1] = other.model.layers[1]
    torch.testing.assert_close(mixed, out(small, batch))
    with pytest.raises(sk.DimensionError, match=r"Config cannot say .*ffn=\(7, 30\)"):
        sk.export(model, sk.Submodel(**{**sizes, "heads": 3}))
    uniform = sk.Submodel(**{**sizes, "heads": (3, 3), "ffn": (7, 7)})
    sk.activate(model, uniform)
    torch.testing.assert_close(out(sk.export(model, uniform), batch), out(model, batch))


def test_feed_forward_sizes_by_block_of_gpt2():
    model, batch = elastic("gpt2"), inputs("gpt2")
    sizes = {"depth": 2, "hidden": 12, "heads": 3}
    small, other = (sk.export(model, sk.Submodel(**sizes, ffn=ffn)) for ffn in (7, 30))
    small.transformer.h[1] = other.transformer.h[1]
    sk.activate(model, sk.Submodel(**sizes, ffn=(7, 30)))
    torch.testing.assert_close(out(model, batch), out(small, batch))


@each_decoder
def test_generation_with_and_without_cache(name):
    model, batch = elastic(name), inputs(name)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    for seed in range(2):
        sk.activate(model, submodel(name, seed))
        small = sk.export(model, submodel(name, seed))
        options = {"max_new_tokens": 5, "do_sample": False}
        expected = small.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options), expected)
        assert torch.equal(model.generate(**batch, **options, use_cache=False), expected)
        assert torch.equal(model.generate(**batch, **options, num_beams=2),
                           small.generate(**batch, **options, num_beams=2))  # fmt: skip


@each_model
def test_recorded_outputs(name):
    model, batch, chosen = plain(name), inputs(name), submodel(name, 1)
    model.set_attn_implementation("eager")
    sk.elasticize(model)
    sk.activate(model, chosen)
    found = model(**batch, output_hidden_states=True, output_attentions=True)
    small = sk.export(model, chosen)
    expected = small(**batch, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == chosen.depth + 1
    assert len(found.attentions) == chosen.depth
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    torch.testing.assert_close(found.attentions, expected.attentions)


LOAD = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    case = torch.load(folder + "/case.pt")
    model = getattr(transformers, case["class"]).from_pretrained(folder)
    difference = (model(**case["inputs"])[0] - case["output"]).abs().max().item()
    assert difference <= 1e-3, (folder, difference)
assert "sorted_kernels" not in sys.modules
"""


def test_transformers_alone_loads_the_exports(tmp_path):
    folders = []
    for name in MODELS:
        model, batch = elastic(name), inputs(name)
        for seed in (3, 4):
            chosen, folder = submodel(name, seed), tmp_path / f"{name}-{seed}"
            sk.export(model, chosen).save_pretrained(folder)
            with sk.active(model, chosen), torch.no_grad():
                case = {"class": type(model).__name__, "inputs": batch, "output": out(model, batch)}
            torch.save(case, folder / "case.pt")
            folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@each_model
def test_the_elastic_model_itself_is_saved_whole(name, tmp_path):
    model, batch = elastic(name), inputs(name)
    expected = out(model, batch)
    sk.activate(model, submodel(name, 0))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(out(type(model).from_pretrained(tmp_path), batch), expected)


@each_model
def test_flops_are_those_of_the_export(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, batch, chosen = elastic(name), inputs(name), submodel(name, 2)
    products = sdpa_kernel(SDPBackend.MATH)  # torch does not count its fused attention on CPUs
    with products, FlopCounterMode(display=False) as counter, torch.no_grad():
        out(sk.export(model, chosen), batch)
    assert sk.count_flops(model, chosen, batch) == counter.get_total_flops() > 0
    (example,) = batch.values()
    assert sk.count_flops(model, chosen, example) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "roberta"])
def test_token_types_positions_and_padding(name):
    model, batch, chosen = elastic(name), inputs(name), submodel(name, 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["input_ids"][0, 4:] = 0
    batch["attention_mask"][0, 4:] = 0
    batch["position_ids"] = torch.arange(9, 2, -1).expand(2, 7)
    if name != "roberta":
        batch["token_type_ids"] = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
    small = sk.export(model, chosen)
    sk.activate(model, chosen)
    torch.testing.assert_close(out(model, batch), out(small, batch))
    for left_out in list(batch)[1:]:
        fewer = {key: value for key, value in batch.items() if key != left_out}
        assert not torch.allclose(out(model, fewer), out(model, batch))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: transformers.T5Model(
                transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                      num_heads=2)
            ),
            "T5Model is not among the architectures known: .*bert, gpt2, llama",
        ),
        (lambda: pretrained._bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True),
         r"crossattention\.\w+.*Linear, has parameters .weight, bias."),
        (lambda: pretrained._gpt2(add_cross_attention=True), r"h\.0\.crossattention"),
        (lambda: pretrained._vit("ViTForMaskedImageModeling"), r"embeddings.*mask_token"),
    ],
    ids=["unknown", "bert-cross", "gpt2-cross", "vit-masked"],
)  # fmt: skip
def test_what_no_table_can_express(make, message):
    model = make()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    with pytest.raises(sk.RuleError, match=message):
        sk.elasticize(model)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before


def test_a_module_added_by_somebody_is_named():
    model = plain("llama")
    model.model.layers[1].mlp.adapter = torch.nn.Linear(24, 24)
    with pytest.raises(sk.RuleError, match=r"model\.layers\.1\.mlp\.adapter, a Linear"):
        sk.elasticize(model)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("llama", {"hidden": 5, "heads": 3}, "not a multiple of the number of attention"),
        ("bert", {"hidden": 12, "heads": 6}, r"hidden must be heads \* 4 = 24"),
        ("gpt2", {"hidden": 12}, r"hidden must be heads \* 4 = 24"),
        ("vit", {"ffn": (3, 4, 5)}, "one ffn for all layers"),
    ],
)
def test_what_a_configuration_cannot_say(name, sizes, message):
    """An error of export; the sub-model itself runs."""
    model = elastic(name)
    sk.activate(model, sk.Submodel(**sizes))
    assert out(model, inputs(name)).isfinite().all()
    with pytest.raises(sk.DimensionError, match=message):
        sk.export(model, sk.Submodel(**sizes))
    assert sk.nn.current(model) == sk.Submodel(**sizes)


def test_heads_are_rounded_up_to_whole_groups():
    model = elastic("llama")
    attention = model.model.layers[0].self_attn
    for heads, groups in ((1, 1), (3, 1), (4, 2), (6, 2)):
        sk.activate(model, sk.Submodel(heads=heads))
        found = [getattr(attention, f"{n}_proj").out_axis.active for n in "qkv"]
        assert found == [groups * 3 * 8, groups * 8, groups * 8]
        assert attention.o_proj.in_axis.active == groups * 3 * 8
    small = sk.export(model, sk.Submodel(heads=1))
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (3, 1)


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_a_part_of_a_model_is_exported_without_its_configuration(name):
    model = elastic(name)
    sk.activate(model, submodel(name, 1))
    body = model.base_model
    layers, batch = (body.layers if name == "vit" else body.h), inputs(name)
    part = sk.export(layers[0].mlp, sk.Submodel(ffn=9, hidden=7))
    x = torch.randn(2, 7)
    with sk.active(layers[0].mlp, sk.Submodel(ffn=9, hidden=7)):
        torch.testing.assert_close(part(x), layers[0].mlp(x))
    if name == "vit":
        with sk.active(body.embeddings, sk.Submodel(hidden=7)):
            tokens = sk.export(body.embeddings, sk.Submodel(hidden=7))
            assert tokens.cls_token.shape == (1, 1, 7) and not tokens._forward_pre_hooks
            torch.testing.assert_close(tokens(**batch), body.embeddings(**batch))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama-tied"])
def test_copies_are_independent(name, how):
    model, batch, chosen = elastic(name), inputs(name), submodel(name, 1)
    sk.activate(model, submodel(name, 2))
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert sk.nn.current(twin) == submodel(name, 2)
    expected = out(sk.export(model, chosen), batch)
    sk.activate(twin, chosen)
    found = out(twin, batch)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(param.grad is None for param in model.parameters())
    assert sk.nn.current(model) == submodel(name, 2) and out(model, batch).isfinite().all()


@pytest.mark.parametrize("mode", ["inplace", "dense"])
def test_parts_of_parameters_on_both_gradient_paths(mode):
    model = sk.elasticize(plain("vit"), grad_mode=mode)
    small = sk.export(model, submodel("vit", 1))
    sk.activate(model, submodel("vit", 1))
    for each in (model, small):
        (out(each, inputs("vit")) * torch.arange(5)).sum().backward()
    embeddings, wanted = model.vit.embeddings, dict(small.vit.embeddings.named_parameters())
    for path, param in embeddings.named_parameters():
        twin = wanted[path]
        block = tuple(slice(size) for size in twin.shape)
        torch.testing.assert_close(param.grad[block], twin.grad)
        assert staircase_of(param).area == twin.numel() and param.grad.count_nonzero() > 0
        assert param.grad.count_nonzero() == param.grad[block].count_nonzero()
