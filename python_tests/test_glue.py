"""GLUE's files, read from a folder, and a tiny BERT fine-tuned on files of their form."""

import random

import pytest
import torch

import sorted_kernels as sk
from sorted_kernels.data import GLUE, GlueTask, Sentences, glue
from support.pretrained import transformers

MARKS = {"entailment": "surely", "neutral": "perhaps", "contradiction": "never"}
FILL = [f"word{index}" for index in range(12)]


def sentence(draw, *marks):
    words = [*marks, *draw.choices(FILL, k=draw.randint(2, 5))]
    draw.shuffle(words)
    return " ".join(words)


def cola(draw):
    label = draw.randint(0, 1)
    return f"made\t{label}\t\t{sentence(draw, 'fine' if label else 'broken')}"


def mrpc(draw):
    """The second sentence tells the label; the first may hold the same mark or the other."""
    label = draw.randint(0, 1)
    first = sentence(draw, draw.choice(["same", "other"]))
    return f"{label}\t7\t8\t{first}\t{sentence(draw, *[['other', 'same'][label]] * 2)}"


def mnli(draw):
    label = draw.choice(list(MARKS))
    return f"1\t{sentence(draw)}\t{sentence(draw, *[MARKS[label]] * 2)}\tx\t{label}"


def stsb(draw):
    score = draw.randint(0, 5)
    first, second = sentence(draw), sentence(draw, *["alike"] * score)
    return f"{first}\t{second}\t{score - 2.5 + 0.1 * draw.random():.3f}"


MADE = {
    "cola": ("", cola),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", mrpc),
    "mnli": ("index\tsentence1\tsentence2\tlabel1\tgold_label\n", mnli),
    "stsb": ("sentence1\tsentence2\tscore\n", stsb),
}


def tokenizer_of(text):
    """Whole words, in alphabetical order."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(text.split()))]
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def write(folder, name, rows=(240, 60)):
    """Made files of a task."""
    head, line = MADE[name]
    for seed, split in enumerate(GLUE[name].files):
        draw = random.Random(seed)
        lines = [line(draw) for _ in range(rows[min(seed, 1)])]
        (folder / f"{split}.tsv").write_text(head + "\r\n".join(lines) + "\n", newline="")


@pytest.mark.parametrize("name", MADE)
def test_sub_models_are_fine_tuned_and_judged(name, one_thread, tmp_path):
    write(tmp_path, name)
    splits, task = glue(tmp_path, name), GLUE[name]
    train, dev = splits["train"], splits[task.files[1]]
    tokenizer = tokenizer_of(" ".join(sum(train.texts, [])))
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, num_labels=task.num_labels,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    model = sk.elasticize(transformers.BertForSequenceClassification(config))
    full = sk.Submodel(**sk.nn.dimensions(model))
    small = sk.Submodel(depth=1, hidden=16, heads=2, ffn=40)
    space = sk.SubmodelSpace.of([full, small])
    language = sk.training.SequenceClassification(model)
    objective = sk.training.Summation(space, forward=language.forward, loss=language.loss)
    optimizer = sk.optim.AdamW(model.parameters(), lr=2e-3)
    loader = train.loader(tokenizer, 20)
    sk.training.fit(model, objective, loader, optimizer, epochs=10, progress=False)
    judged = dev.loader(tokenizer, 32, shuffle=False)
    for metric in task.metrics:
        found = sk.inference.evaluate(
            model, space, judged, metric=metric, forward=language.logits, progress=False
        )
        assert all(row.metric > 0.8 for row in found), (metric, found)
        assert found[full].flops > 2 * found[small].flops


def test_what_the_files_say(tmp_path):
    lines = ["sentence\tlabel", 'a "quoted word\t1', "a line\u2028end and \x85\t0", ""]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines), "utf-8")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tunlabelled\n")
    found = glue(tmp_path, "sst2")
    assert list(found) == ["train", "dev"]
    assert found["dev"].texts == (['a "quoted word', "a line\u2028end and \x85"],)
    assert found["dev"].labels.tolist() == [1, 0]
    own = GlueTask(("sentence",), "label", (), ("pearson",), ("dev",))
    assert glue(tmp_path, own)["dev"].labels.dtype == torch.float32


def test_batches_are_as_long_as_their_longest_row():
    tokenizer = tokenizer_of("a b c d")
    texts = (["a", "a b c", "d", "b"], ["c", "d", "a a", "b"])
    loader = Sentences(texts, torch.arange(4)).loader(tokenizer, 2, shuffle=False, max_length=6)
    (first, labels), (second, _) = loader
    assert first["input_ids"].shape == (2, 6) and second["input_ids"].shape == (2, 6)
    assert first["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert first["attention_mask"].sum(1).tolist() == [5, 6] and labels.tolist() == [0, 1]
    alone = Sentences(texts[:1], torch.arange(4)).loader(tokenizer, 2, shuffle=False)
    assert [batch["input_ids"].shape[1] for batch, _ in alone] == [5, 3]


def test_known_broken_lines_are_left_out(tmp_path):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(f"{head}1\t2\t3\tcut\n1\t2\t3\ta\tb\t1\n")
    assert glue(tmp_path, "qqp")["train"].texts == (["a"], ["b"])


HEAD = "sentence\tlabel\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "train.tsv' cannot be read: No such file"),
        (b"a\xff", "is not UTF-8 at byte 1"),
        (b"", r"has columns \[''\]; the task also needs \['sentence', 'label'\]"),
        (b"sentence\tscore\n", r"\['sentence', 'score'\]; the task also needs \['label'\]"),
        (HEAD.encode(), "has no labelled sentence"),
        (HEAD.encode() + b"good\t1\nbad\n", "has 1 columns in line 3; the task needs at least 2"),
        (HEAD.encode() + b"good\tyes\n", r"has labels \['yes'\]; allowed are 0, 1"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(sk.DataError, match=message):
        glue(tmp_path, "sst2")


@pytest.mark.parametrize("label", ["high", "nan"])
def test_a_score_that_is_no_number(tmp_path, label):
    (tmp_path / "train.tsv").write_text(f"sentence1\tsentence2\tscore\na\tb\t{label}\n")
    with pytest.raises(sk.DataError, match=f"has the score '{label}'"):
        glue(tmp_path, "stsb")


def test_an_unknown_task(tmp_path):
    with pytest.raises(sk.OptionError, match="task is 'squad'; allowed are cola, sst2"):
        glue(tmp_path, "squad")
