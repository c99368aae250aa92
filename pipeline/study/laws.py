"""Lines and laws through the points of a study, for many draws of their values at once.

P points, S draws. `flops` are float64 [P], values [S, P]: the first row holds the values
themselves, the others those of bootstrap draws.
"""

from dataclasses import dataclass

import numpy as np

# exponents of the power law that are tried
EXPONENTS = np.geomspace(0.02, 3.0, 160)
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Law:
    """`a + b * f(C)` of each draw, where f is ln C or C**-c."""

    kind: str  # log or power
    a: np.ndarray  # float64 [S]
    b: np.ndarray
    c: np.ndarray  # 0 where kind is log

    def values(self, flops: np.ndarray) -> np.ndarray:
        """At some FLOP, float64 [S, n]."""
        flops = np.atleast_1d(flops)[None, :]
        if self.kind == "log":
            return self.a[:, None] + self.b[:, None] * np.log(flops)
        return self.a[:, None] + self.b[:, None] * flops ** -self.c[:, None]


def fit_slopes(flops: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Slope of the least-squares line of each draw, float64 [S]."""
    centred = flops - flops.mean()
    return values @ centred / (centred @ centred)


def fit_log(flops: np.ndarray, values: np.ndarray) -> Law:
    """a + b ln C by least squares; two points or more.

    >>> law = fit_log(np.array([1.0, 10.0, 100.0]), np.array([[0.9, 0.8, 0.7]]))
    >>> law.values(np.array([1000.0])).round(6).tolist()
    [[0.6]]
    """
    slope = fit_slopes(np.log(flops), values)
    start = values.mean(axis=1) - slope * np.log(flops).mean()
    return Law("log", start, slope, np.zeros(len(values)))


def fit_power(flops: np.ndarray, values: np.ndarray) -> Law:
    """a + b C**-c: the best of `EXPONENTS`, with a and b by least squares; four points or more,
    since three always fit.

    >>> flops = np.array([1.0, 4.0, 16.0, 64.0])
    >>> law = fit_power(flops, (0.5 + 0.4 * flops**-0.5)[None])
    >>> law.values(np.array([256.0])).round(3).tolist()
    [[0.525]]
    """
    scaled = flops / flops.min()
    best = np.full(len(values), np.inf)
    a, b, c = (np.zeros(len(values)) for _ in range(3))
    for exponent in EXPONENTS:
        feature = scaled**-exponent
        slope = fit_slopes(feature, values)
        start = values.mean(axis=1) - slope * feature.mean()
        error = ((values - start[:, None] - slope[:, None] * feature) ** 2).sum(axis=1)

        better = error < best
        best[better] = error[better]
        a[better], b[better], c[better] = start[better], slope[better], exponent
    return Law("power", a, b * flops.min() ** c, c)


def interval(draws: np.ndarray) -> dict[str, float | None]:
    """The value itself and the interval that holds 95 % of the draws; null where undefined.

    >>> interval(np.array([2.0, 1.0, 2.0, 3.0]))["value"]
    2.0
    """
    drawn = draws[1:][np.isfinite(draws[1:])]
    value = float(draws[0]) if np.isfinite(draws[0]) else None
    if value is None or len(drawn) == 0:
        return {"value": value, "low": None, "high": None}
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return {"value": value, "low": float(low), "high": float(high)}


def pareto_front(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool [n]: the points that no other beats in both, cheaper and better (a larger value).

    >>> pareto_front(np.array([1.0, 2.0, 3.0]), np.array([0.6, 0.5, 0.7])).tolist()
    [True, False, True]
    """
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    is_front = np.zeros(len(costs), bool)
    is_front[order] = values[order] > np.r_[-np.inf, best[:-1]]
    return is_front
