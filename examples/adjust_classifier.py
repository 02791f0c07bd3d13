"""What a classifier of its own adds to each sub-model (SortedNet, appendix D.4, Figure 8).

MobileNetV2's 160 sub-models are trained at once as in ``mobilenet_grid.py``. Then, for each of
them, the classifier alone is trained on for 5 epochs, with everything before it frozen: since that
does not change, its features are computed once.

    python examples/adjust_classifier.py                   # digits, a few minutes on 2 cores
    python examples/adjust_classifier.py --preset cifar10 --data cifar-10-python.tar.gz  # a GPU
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from mobilenet_grid import DEPTHS, WIDTHS, Preset, arguments, judge, logits, network, prepare, train
from torch import Tensor

import sorted_kernels as sk
from sorted_kernels.data import Batches, Images
from sorted_kernels.inference import Results, Row

EPOCHS, LR = 5, 1e-3  # the paper gives the epochs alone


def features(
    model: torch.nn.Module, submodel: sk.Submodel, loader: Batches
) -> tuple[Tensor, Tensor]:
    """What the classifier reads, for every image of a loader, and the targets."""
    seen: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    targets = []
    try:
        with sk.active(model.eval(), submodel), torch.no_grad():
            for x, y in loader:
                logits(model, x)
                targets.append(y)
    finally:
        hook.remove()
    return torch.cat(seen), torch.cat(targets)


def adjusted(model: torch.nn.Module, submodel: sk.Submodel, data: Images, preset: Preset) -> float:
    """Accuracy of a sub-model with a classifier trained on for it; the model stays as it is."""
    with sk.active(model, submodel):
        head = copy.deepcopy(model.classifier).plain()
    train_loader = data.train_loader(preset.batch_size, augment=False, seed=preset.seed)
    loader = Batches(*features(model, submodel, train_loader), preset.batch_size, seed=preset.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR)
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()
    x, y = features(model, submodel, data.test_loader())
    with torch.no_grad():
        return (head(x).argmax(-1) == y).float().mean().item()


def main(given: list[str] | None = None) -> tuple[Results, Results]:
    options = arguments("Train each sub-model's classifier on").parse_args(given)
    preset, data = prepare(options)
    space = sk.SubmodelSpace(depth=DEPTHS, width=WIDTHS)
    model = network(preset, options.model).to(options.device)
    train(model, space, data, preset)
    before = judge(model, space, data, preset)
    after = Results(
        Row(row.submodel, adjusted(model, row.submodel, data, preset), row.parameters, row.flops)
        for row in before
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for name, results in (("shared", before), ("adjusted", after)):
        results.to_csv(options.out / f"classifier_{name}.csv")
        title = f"accuracy with the {name} classifier, recovery in % under it"
        sk.inference.heat_map(results, options.out / f"classifier_{name}.png", title=title)
    gains = [(100 * (b.metric - a.metric), a) for a, b in zip(before, after, strict=True)]
    print(f"mean gain {sum(gain for gain, _ in gains) / len(gains):+.2f} points; ", end="")
    gain, row = max(gains, key=lambda pair: pair[0])
    print(f"largest {gain:+.2f} ({row.submodel}, {100 * row.metric:.2f}% before)")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    main()
