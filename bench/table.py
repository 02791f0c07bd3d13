"""Ratios of one case's rows, printed beside the goals and the limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.goals import LIMIT
from bench.harness import BASELINES, Case
from bench.rows import Row

SECONDS = {"ms": 1e-3, "us": 1e-6}
RATES = {"copy": "GB/s", "matmul": "TFLOP/s"}
NOISY_SPREAD = 1.5  # p80 over p20 from which a ratio of medians says little
NOISY_PREEMPTIONS = 50.0  # a second: two threads that wait for each other feel each of them


def limit_share(row: Row, limits: Mapping[str, float]) -> float | None:
    """Least possible time over the measured one.

    Args:
        row: A timed row.
        limits: ``{"copy": GB/s, "matmul": TFLOP/s}`` measured on the same device.

    Returns:
        None where the row says nothing of its work, or no limit was measured.
    """
    floors = []
    if row.flops and "matmul" in limits:
        floors.append(row.flops / limits["matmul"] / 1e12)
    if row.bytes and "copy" in limits:
        floors.append(row.bytes / limits["copy"] / 1e9)
    return max(floors) / (row.p50 * SECONDS[row.metric]) if floors else None


def limits_for(row: Row, rows: Iterable[Row]) -> dict[str, float]:
    """The limits that apply to a row: the latest of its device, the rate only in its dtype."""
    found = {}
    for limit in rows:
        known = limit.kernel == "limit" and limit.mode in RATES and limit.device == row.device
        if known and (limit.mode == "copy" or limit.dtype == row.dtype):
            found[limit.mode] = limit.p50
    return found


def describe(
    case: Case, rows: Sequence[Row], limits: Mapping[str, float], preemptions: float = 0.0
) -> list[str]:
    """Lines for a person: the times, each contestant over each baseline, and the goals.

    Args:
        case: The problem.
        rows: One a contestant.
        limits: As in :func:`limit_share`.
        preemptions: How often a second another program took the processor meanwhile.
    """
    by_provider = {row.provider: row for row in rows}
    times = "  ".join(
        f"{name} {row.p50:.3g} [{row.p20:.3g}, {row.p80:.3g}]" for name, row in by_provider.items()
    )
    unit = f"{rows[0].metric}, p50 [p20, p80], {rows[0].samples} samples"
    lines = [f"{case}  ({unit})", f"    {times}"]
    noisy = [name for name, row in by_provider.items() if row.p80 > NOISY_SPREAD * row.p20]
    if noisy:
        lines.append(f"    NOISY: samples of {', '.join(noisy)} differ widely; measure again")
    if preemptions > NOISY_PREEMPTIONS:
        lines.append(f"    NOISY: preempted {preemptions:.0f} times a second by other programs")
    for name, row in by_provider.items():
        if name in BASELINES:
            continue
        ratios = [
            f"{name}/{other} {row.p50 / by_provider[other].p50:.2f}"
            for other in reversed(BASELINES)
            if other in by_provider
        ]
        if "B0" in by_provider:
            ratios.append(f"B0/{name} {by_provider['B0'].p50 / row.p50:.1f}x")
        share = limit_share(row, limits)
        if share is not None and case.device.type == "cuda":
            ratios.append(f"{share:.0%} of the limit")
        if ratios:
            lines.append("    " + "  ".join(ratios))
        for goal in case.goals if name == "ours" else ():
            ratio = None
            if goal.baseline in by_provider:
                ratio = row.p50 / by_provider[goal.baseline].p50
            elif goal.baseline == LIMIT and share:
                ratio = 1 / share
            if ratio is not None:
                lines.append(f"    goal: {goal}: {goal.verdict(ratio)}")
    return lines
