"""Training elastic models of ``transformers``: in place, checkpointed, autocast, by its Trainer."""

import pytest
import torch

import sorted_kernels as sk
from support.pretrained import DECODERS, elastic, inputs, submodel, transformers

each_decoder = pytest.mark.parametrize("name", DECODERS)


def gradients(model, batch, amp=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def check(found, expected, **tolerance):
    """Gradients of the elastic model's active blocks against the exported model's."""
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for name, wanted in expected[1].items():
        block = found[1][name]
        if "c_attn" in name:  # three parts
            by_part = block.unflatten(-1, (3, -1))[..., : wanted.shape[-1] // 3].flatten(-2)
            block = by_part
        block = block[tuple(slice(size) for size in wanted.shape)]
        torch.testing.assert_close(block, wanted, msg=lambda text, n=name: f"{n}: {text}",
                                   **tolerance)  # fmt: skip


@each_decoder
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing(name, reentrant):
    model, chosen, batch = elastic(name).train(), submodel(name, 1), inputs(name)
    for module in model.modules():  # GPT-2 has some by default
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0
    small = sk.export(model, chosen)
    for module in small.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(small, batch)
    sk.activate(model, chosen)
    check(gradients(model, batch), expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check(gradients(model, batch), expected)
    assert model.is_gradient_checkpointing


@each_decoder
def test_autocast(name):
    model, chosen, batch = elastic(name), submodel(name, 1), inputs(name)
    small = sk.export(model, chosen)
    sk.activate(model, chosen)
    plain = gradients(small, batch, amp=True)
    exact = gradients(small, batch)
    scale = max(float(g.abs().max()) for g in exact[1].values())
    check(gradients(model, batch, amp=True), plain, rtol=0.05, atol=0.02 * scale)


@each_decoder
def test_bfloat16_models(name):
    model, chosen, batch = elastic(name).bfloat16(), submodel(name, 1), inputs(name)
    small = sk.export(model, chosen)
    assert {param.dtype for param in small.parameters()} == {torch.bfloat16}
    sk.activate(model, chosen)
    found, expected = gradients(model, batch), gradients(small, batch)
    scale = max(float(g.abs().max()) for g in expected[1].values())
    check(found, expected, rtol=0.05, atol=0.02 * scale)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2"])
def test_training_over_submodels_in_place_equals_dense(name):
    losses = {}
    for mode in ("inplace", "dense"):
        model = elastic(name)
        for module in model.modules():
            if hasattr(module, "grad_mode"):
                module.grad_mode = mode
        optimizer = sk.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        losses[mode] = []
        for step in range(12):
            optimizer.zero_grad()
            with sk.active(model, submodel(name, step % 3)):
                batch = inputs(name, step % 2)
                loss = model(**batch, labels=batch["input_ids"]).loss
                loss.backward()
            optimizer.step()
            losses[mode].append(loss.item())
    torch.testing.assert_close(losses["inplace"], losses["dense"], rtol=1e-5, atol=1e-5)
    assert sum(losses["inplace"][6:]) < sum(losses["inplace"][:6])  # the same batches again


def test_training_one_submodel_is_training_its_export():
    model, chosen = elastic("llama"), submodel("llama", 1)
    small = sk.export(model, chosen)
    sk.activate(model, chosen)
    runs = (
        (model, sk.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)),
        (small, torch.optim.AdamW(small.parameters(), lr=1e-3, eps=1e-3)),
    )
    losses = []
    for each, optimizer in runs:
        losses.append([])
        for step in range(5):
            optimizer.zero_grad()
            batch = inputs("llama", step)
            loss = each(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra 'hf')")
    model = elastic("llama")
    sk.activate(model, sk.Submodel(depth=2, hidden=12, heads=3, ffn=9))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    texts = torch.cat([inputs("llama", seed)["input_ids"] for seed in range(4)])
    rows = [{"input_ids": row, "labels": row} for row in texts]
    options = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", weight_decay=0.1, disable_tqdm=True,
    )  # fmt: skip
    optimizer = sk.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = transformers.Trainer(model, options, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    q = "model.layers.0.self_attn.q_proj.weight"
    moved = model.get_parameter(q) != before[q]
    assert moved[:24, :12].all() and moved.sum() == 24 * 12
    last = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(last), before[last])
    trainer.save_model(tmp_path / "model")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again.get_parameter(q), model.get_parameter(q))
