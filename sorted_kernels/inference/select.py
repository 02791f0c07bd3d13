"""The sub-model to serve: the best within a budget, or the cheapest that is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sorted_kernels.errors import OptionError
from sorted_kernels.inference.results import Results, Row


@dataclass(frozen=True)
class _Constraint:
    """One condition on a row: ``read(row) <= bound``, or ``>=``."""

    label: str
    bound: float
    at_most: bool
    read: Callable[[Row], float]

    def excess(self, row: Row) -> float:
        """How far the row is outside, as a part of the bound; 0 where it qualifies."""
        value = self.read(row)
        outside = value - self.bound if self.at_most else self.bound - value
        if math.isnan(outside):
            return math.inf
        return max(outside, 0.0) / max(abs(self.bound), 1e-12)

    def __str__(self) -> str:
        return f"{self.label} {'<=' if self.at_most else '>='} {self.bound:g}"


def select(
    results: Results,
    *,
    max_flops: float | None = None,
    max_params: float | None = None,
    max_latency_ms: float | None = None,
    min_metric: float | None = None,
    min_recovery: float | None = None,
) -> Row:
    """Choose a row.

    With a budget (``max_...``): the best metric within it, the cheapest where several share it.
    With ``min_metric`` or ``min_recovery`` alone: the fewest FLOPs that reach it.

    Args:
        results: What ``evaluate`` gave.
        max_flops: Budget in FLOPs of one forward.
        max_params: Budget in parameters.
        max_latency_ms: Budget in milliseconds; the results must have the latency.
        min_metric: The worst metric allowed: at least this, or at most this where less is better.
        min_recovery: The worst metric allowed, in percent of the best one (0 to 100).

    Raises:
        OptionError: No condition or an impossible one is given, the latency was not measured, or
            no row qualifies; the message then names the nearest one.
    """
    given = [
        ("max_flops", "flops", max_flops),
        ("max_params", "parameters", max_params),
        ("max_latency_ms", "latency_ms", max_latency_ms),
    ]
    budgets = [_budget(*budget) for budget in given if budget[2] is not None]
    floors = []
    if min_metric is not None:
        if math.isnan(min_metric):
            raise OptionError("min_metric is nan; allowed is any other number")
        higher = results.higher_is_better
        floors.append(_Constraint(results.metric, min_metric, not higher, lambda r: r.metric))
    if min_recovery is not None:
        if not 0 < min_recovery <= 100:
            raise OptionError(
                f"min_recovery is {min_recovery!r}; allowed are percents above 0, to 100"
            )
        floors.append(_Constraint("recovery in percent", min_recovery, False, results.recovery))
    constraints = [*budgets, *floors]
    if not constraints:
        raise OptionError(
            "select was given no condition; allowed are max_flops, max_params, max_latency_ms, "
            "min_metric and min_recovery"
        )
    fitting = [row for row in results if not any(c.excess(row) for c in constraints)]
    if not fitting:
        raise OptionError(_nothing_fits(results, constraints))
    if budgets:
        return max(fitting, key=lambda r: (results.goodness(r), -r.flops, -r.parameters))
    return min(fitting, key=lambda r: (r.flops, r.parameters, -results.goodness(r)))


def _budget(option: str, cost: str, bound: float | None) -> _Constraint:
    if bound is None or not bound > 0:
        raise OptionError(f"{option} is {bound!r}; allowed are numbers above 0")
    return _Constraint(cost, float(bound), True, lambda row: row.cost(cost))


def _nothing_fits(results: Results, constraints: list[_Constraint]) -> str:
    nearest = min(results, key=lambda row: sum(c.excess(row) for c in constraints))
    values = ", ".join(f"{c.label} {c.read(nearest):g}" for c in constraints)
    conditions = " and ".join(map(str, constraints))
    return f"no sub-model has {conditions}; the nearest is {nearest.submodel} with {values}"
