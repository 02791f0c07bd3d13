"""Tasks of language models: exits under one head, distillation, the Trainer, the example."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sorted_kernels as sk
from sorted_kernels.errors import CheckpointError, OptionError
from sorted_kernels.training.exits import forward_exits
from sorted_kernels.training.language import soft_head_loss

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="transformers 5 is not installed (extra 'hf')"
)
WORDS = 40


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **options,
    )  # fmt: skip
    return sk.elasticize(transformers.LlamaForCausalLM(config))


def depths(model, *sizes):
    full = sk.Submodel(**sk.nn.dimensions(model))
    return [full.replace(depth=depth) for depth in sizes]


def tokens(seed=1, rows=3, length=9):
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def logits_losses(model, chain, ids, labels):
    """The same losses by the model's own forward and whole logits."""
    losses = []
    for submodel in chain:
        with sk.active(model, submodel):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))
    return torch.stack(losses)


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("hidden", [16, 8])
def test_sorted_fine_tuning_is_the_mean_over_the_exits(tied, hidden):
    model, ids = llama(tie_word_embeddings=tied), tokens()
    chain = [s.replace(hidden=hidden) for s in depths(model, 1, 2, 4)]
    labels = ids.clone()
    labels[0, 4:] = -100
    task = sk.training.CausalLM(model)
    space = sk.SubmodelSpace.of(chain)
    objective = sk.training.Summation(space, forward=task.forward, loss=task.loss)
    loss = objective(model, {"input_ids": ids, "labels": labels})
    found = gradients(model)
    model.zero_grad()
    expected = []
    for submodel in chain:  # gradients land with the sizes that are active in the backward
        with sk.active(model, submodel):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            one = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            (one / 3).backward()
        expected.append(one.detach())
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_padding_and_plain_ids():
    model, ids = llama(), tokens()
    task = sk.training.CausalLM(model)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    _, targets = task.forward(model, {"input_ids": ids, "attention_mask": mask})
    assert (targets == -100).equal(mask[:, 1:] == 0)
    hidden, targets = task.forward(model, ids)
    assert hidden.shape == (3, 8, 16) and targets.equal(ids[:, 1:])
    total, count = task.metric(hidden, targets)
    assert count == 24 and float(total) / 24 == pytest.approx(task.loss(hidden, targets).item())


def test_evaluate_gives_the_loss_of_each_exit():
    model, ids = llama().eval(), tokens()
    task = sk.training.CausalLM(model)
    chain = depths(model, 1, 4)
    results = sk.inference.evaluate(
        model,
        chain,
        [(ids, ids[:, 1:])],
        metric=task.metric,
        higher_is_better=False,
        forward=lambda model, ids: task.forward(model, ids)[0],
    )
    expected = logits_losses(model, chain, ids, ids)
    assert [row.metric for row in results] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("weights", [None, [0.5, 3.0]])
def test_exits_learn_from_the_deepest(weights):
    model, ids = llama(), tokens()
    chain = depths(model, 2, 4)
    task = sk.training.CausalLM(model, distill=0.75)
    pairs = forward_exits(model, chain, lambda: task.forward(model, ids))
    hidden = [pair[0] for pair in pairs]
    losses = task.loss.of_exits(hidden, ids[:, 1:], weights)
    own = logits_losses(model, chain, ids, ids)
    with torch.no_grad():
        student, teacher = (model.lm_head(h).flatten(0, 1) for h in hidden)
        soft = F.cross_entropy(student, teacher.softmax(-1))
    expected = torch.stack([0.25 * own[0] + 0.75 * soft, own[1]])
    torch.testing.assert_close(losses, expected * torch.tensor(weights or [1.0, 1.0]))
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_soft_loss_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr("sorted_kernels.training.language._CHUNK_BYTES", 4 * WORDS * chunk)
    head = sk.nn.Linear(16, WORDS, bias=False)
    generator = torch.Generator().manual_seed(2)
    hidden, teacher = torch.randn(2, 3, 5, 16, generator=generator)
    targets = tokens(3, 3, 5)
    targets[0, 2] = -100
    hidden.requires_grad_()
    loss = soft_head_loss(head, hidden, teacher, targets)
    (0.5 * loss).backward()
    found, dx = head.weight.grad.clone(), hidden.grad.clone()
    weight = head.weight.detach().clone().requires_grad_()
    again = hidden.detach().clone().requires_grad_()
    kept = targets != -100
    expected = F.cross_entropy(
        (again @ weight.T)[kept], (teacher @ weight.T)[kept].softmax(-1).detach()
    )
    (0.5 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, weight.grad)
    torch.testing.assert_close(dx, again.grad)


def test_checkpointing_and_autocast():
    ids = tokens()
    found = []
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        task = sk.training.CausalLM(model)
        space = sk.SubmodelSpace.of(depths(model, 1, 3, 4))
        objective = sk.training.Summation(
            space, forward=task.forward, loss=task.loss, autocast=torch.bfloat16
        )
        found.append((objective(model, ids), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], msg=name)
    own = logits_losses(model.eval(), depths(model, 1, 3, 4), ids, ids).mean()
    torch.testing.assert_close(found[0][0], own.detach(), rtol=2e-2, atol=0)


@pytest.mark.parametrize(("labels", "number"), [([0, 2, 1], 3), ([0.5, -1.0, 2.0], 1)])
def test_sequence_classification_with_exits(labels, number):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_labels=number,
    )  # fmt: skip
    model = sk.elasticize(transformers.BertForSequenceClassification(config)).eval()
    task = sk.training.SequenceClassification(model)
    batch = {"input_ids": tokens(), "labels": torch.tensor(labels)}
    chain = depths(model, 1, 3)
    objective = sk.training.Summation(
        sk.SubmodelSpace.of(chain), forward=task.forward, loss=task.loss
    )
    loss, expected = objective(model, batch), []
    for submodel in chain:
        with sk.active(model, submodel):
            expected.append(model(**batch).loss)
    torch.testing.assert_close(loss, torch.stack(expected).mean().detach())


def test_bad_options():
    with pytest.raises(OptionError, match="distill is 2"):
        sk.training.CausalLM(llama(), distill=2)
    with pytest.raises(OptionError, match="no head"):
        sk.training.CausalLM(llama().model)


def trainer(folder, steps, **options):
    from sorted_kernels.training.trainer import SortedTrainer

    model = llama()
    task = sk.training.CausalLM(model)
    space = sk.SubmodelSpace.of(depths(model, 1, 2, 4))
    objective = sk.training.Stochastic(space, forward=task.forward, loss=task.loss, seed=3)
    data = [{"input_ids": row, "labels": row} for row in tokens(5, 64, 8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=12,
        gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=7, **options,
    )  # fmt: skip
    return SortedTrainer(model=model, args=arguments, train_dataset=data, objective=objective)


def test_trainer_trains_and_resumes(tmp_path):
    whole = trainer(tmp_path / "whole", 20)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    assert losses[0] == pytest.approx(math.log(WORDS), rel=0.1), "a mean, not a sum of two"
    assert type(whole.optimizer.optimizer) is sk.optim.AdamW
    resumed = trainer(tmp_path / "whole", 20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    (tmp_path / "whole" / "checkpoint-12" / "objective.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no objective\.pt"):
        trainer(tmp_path / "whole", 20).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12")
        )


def test_trainer_refuses_what_it_cannot(tmp_path):
    from sorted_kernels.training.trainer import SortedTrainer

    with pytest.raises(OptionError, match="objective is None"):
        SortedTrainer(model=llama(), objective=None)
    bf16 = trainer(tmp_path, 2, bf16=True)
    assert bf16.objective.autocast is torch.bfloat16
    bf16.train()


def test_the_smollm2_example_runs_on_a_tiny_model(tmp_path, capsys, monkeypatch):
    path = Path(__file__).parent.parent / "examples" / "soft_smollm2.py"
    spec = importlib.util.spec_from_file_location("soft_smollm2", path)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # its dataclass looks there
    spec.loader.exec_module(example)
    found = example.run("tiny", tmp_path)
    assert list(found) == ["before", "Sorted Fine-Tuning", "plain fine-tuning", "SFT+ICT"]
    assert found["before"] != found["Sorted Fine-Tuning"]
    assert found["plain fine-tuning"][-1] < found["before"][-1]
    assert (tmp_path / "perplexity.png").stat().st_size > 10_000
    assert (tmp_path / "perplexity.csv").read_text().startswith("method,1,2,3")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.config.num_hidden_layers == 3
    assert "exit after layer" in capsys.readouterr().out
