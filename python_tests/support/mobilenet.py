"""A tiny MobileNetV2 of ``transformers`` with random weights that tell its sub-models apart."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="transformers 5 is not installed (extra 'hf')"
)

OPTIONS = {
    "num_channels": 1, "image_size": 32, "depth_multiplier": 0.5, "depth_divisible_by": 4,
    "min_depth": 4, "finegrained_output": False, "num_labels": 10, "output_stride": 8,
}  # fmt: skip


def plain(kind="MobileNetV2ForImageClassification", **changes):
    """An untouched model in evaluation mode; its norms, statistics and activations are random."""
    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(**{**OPTIONS, **changes})
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 4:  # initial weights are so small that all logits are alike
                param.mul_(8)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model
