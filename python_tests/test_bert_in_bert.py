"""The example that trains BERT-base inside BERT-large: a tiny pair, and the real pair's sizes."""

import importlib
from pathlib import Path

import pytest
import torch

import sorted_kernels as sk
from support.pretrained import transformers

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("bert_in_bert")


def test_both_are_trained_and_the_smaller_is_a_checkpoint(example, one_thread, tmp_path, capsys):
    found = example.main(["--preset", "tiny", "--out", str(tmp_path)])
    assert list(found) == ["before", "in turn", "alone"]
    for index in (0, 1):
        before, *after = (values[index] for values in found.values())
        assert max(after) < before < 400
    printed = capsys.readouterr().out
    assert printed.count("depth=") == 2 and "in turn" in printed
    assert (tmp_path / "perplexity.csv").read_text().startswith("network,parameters,")
    small = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    assert (small.config.num_hidden_layers, small.config.hidden_size) == (2, 24)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    inputs = tokenizer("def f(x): return [MASK]", return_tensors="pt")
    assert tokenizer.mask_token_id in inputs.input_ids and small(**inputs).logits.isfinite().all()
    # What was written goes in again, as the larger network of a pair.
    again = example.main(
        ["--preset", "tiny", "--weights", str(tmp_path / "base"), "--out", str(tmp_path / "again")]
    )
    assert again["before"][1] == pytest.approx(found["in turn"][0])
    smaller = transformers.AutoConfig.from_pretrained(tmp_path / "again" / "base")
    assert (smaller.num_hidden_layers, smaller.hidden_size) == (1, 16)


def test_masks_are_berts(example):
    tokenizer = transformers.BertTokenizer().train_new_from_iterator(["a b c d e"], 50)
    ids = torch.full((200, 500), tokenizer.convert_tokens_to_ids("a"))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    read, labels = example.Masks(tokenizer)(ids, torch.Generator().manual_seed(0)).unbind(1)
    asked = labels != -100
    assert torch.equal(read[~asked], ids[~asked]) and torch.equal(labels[asked], ids[asked])
    assert not asked[:, [0, -1]].any()
    assert asked[:, 1:-1].float().mean() == pytest.approx(0.15, abs=0.005)
    assert (read[asked] == tokenizer.mask_token_id).float().mean() == pytest.approx(
        0.8 + 0.1 / len(tokenizer), abs=0.01
    )
    kept = 0.1 + 0.1 / len(tokenizer)
    assert (read[asked] == ids[asked]).float().mean() == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_the_pair_is_bert_base_in_bert_large(example, kind):
    """On the meta device: the real sizes, without their memory."""
    make, preset = getattr(transformers, kind), example.PRESETS["gpu"]
    with torch.device("meta"):
        model = sk.elasticize(make(transformers.BertConfig(**preset.config)))
        base = make(transformers.BertConfig())
    assert sk.nn.dimensions(model) == {"hidden": 1024, "depth": 24, "heads": 16, "ffn": 4096}
    small = sk.export(model, example.smaller(model))
    expected, found = base.config.to_dict(), small.config.to_dict()
    assert found == expected and type(small) is type(base)
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (small, base)]
    assert shapes[0] == shapes[1]
