"""Models of ``transformers`` made elastic by their tables: what stays, and every sub-model."""

import subprocess
import sys

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.nn.layers import ElasticModule
from sorted_kernels.ops.gradient import staircase_of
from support import pretrained
from support.pretrained import DECODERS, MODELS, elastic, inputs, out, plain, submodel

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
                if isinstance(module, ElasticModule):
                    module.active_view(name, mask).fill_(True)
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
    upstream = torch.randn(out(model, batch).shape)
    (out(model, batch) * upstream).sum().backward()
    (out(small, batch) * upstream).sum().backward()
    sk.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    torch.optim.AdamW(small.parameters(), lr=0.1, weight_decay=0.1).step()
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


@each_decoder
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
    from torch.utils.flop_counter import FlopCounterMode

    model, batch, chosen = elastic(name), inputs(name), submodel(name, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out(sk.export(model, chosen), batch)
    assert sk.count_flops(model, chosen, batch) == counter.get_total_flops() > 0
    (example,) = batch.values()
    assert sk.count_flops(model, chosen, example) == counter.get_total_flops()
