"""Stochastic length: training on a part of long histories (HSTU, arXiv:2402.17152, eq. 4; the newest part is kept)."""

import math

import numpy as np

from pipeline.config import StochasticLengthConfig


def threshold(cfg: StochasticLengthConfig) -> int:
    return math.floor(cfg.max_len ** (cfg.alpha / 2))


def stochastic_lengths(lengths: np.ndarray, cfg: StochasticLengthConfig, rng: np.random.Generator) -> np.ndarray:
    """How many of the newest rows each history keeps, int64 [n].

    A history of n rows, n above thr = floor(max_len^(alpha/2)), is cut to thr with probability
    1 - max_len^alpha / n^2, so that attention costs O(max_len^alpha) on average; inference never cuts.
    """
    draw = rng.random(len(lengths))  # one draw per history, whatever its length: the plan of a step never shifts
    if cfg.alpha == 2.0:
        return lengths
    keep_all = cfg.max_len**cfg.alpha / np.maximum(lengths, 1).astype(np.float64) ** 2
    short = threshold(cfg)
    return np.where((lengths > short) & (draw >= keep_all), short, lengths)
