"""torch.amp.GradScaler over float16 autocast, with gradients in place and staircase optimizers."""

import pytest
import torch

import sorted_kernels as sk
from support.poison import assert_same_bits

WIDTHS = [8, 32, 16, 32, 8]
OVERFLOWS = 3  # the step whose loss is infinite


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        sk.nn.Linear(16, 32, out_dim="width", activation="relu"),
        sk.nn.Linear(32, 8, in_dim="width"),
    )


def loss_of(model, x, target):
    with torch.autocast("cpu", torch.float16):
        return (model(x).float() - target).square().mean()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_steps_are_those_without_and_an_overflow_is_skipped(optimizer):
    torch.manual_seed(0)
    scaled, plain = network(), network()
    make = getattr(sk.optim, optimizer)
    scaled_steps, plain_steps = (make(m.parameters(), lr=1e-2) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, width in enumerate(WIDTHS):
        for model in (scaled, plain):
            sk.activate(model, sk.Submodel(width=width))
            model.zero_grad()
        x, target = torch.randn(5, 16), torch.randn(5, 8)
        before = [p.detach().clone() for p in scaled.parameters()]

        loss = loss_of(scaled, x, target) * (torch.inf if step == OVERFLOWS else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(scaled_steps)
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        scaler.step(scaled_steps)
        scaler.update()
        if step == OVERFLOWS:
            for param, same in zip(scaled.parameters(), before, strict=True):
                assert_same_bits(param.detach(), same)
            assert scaler.get_scale() == 2.0**9
            continue

        loss_of(plain, x, target).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        plain_steps.step()
        moved = [p.detach() != b for p, b in zip(scaled.parameters(), before, strict=True)]
        assert moved[0][:width].any() and not moved[0][width:].any()
        for one, other in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
