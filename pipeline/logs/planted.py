"""What is planted in generated logs: by the settings lasting tastes, drifting ones, or chains over
sessions. Of the last two it is known how well anybody could tell the action from the history.

    plant_rows          categories and actions, while the logs are made
    best_log_odds       log-odds of each row's action, given all that a reader of the history saw,
                        or its newest rows alone

The log-odds of the whole history stand in the logs as `best.ACTION`. It is no column of LOG: no
build reads it, only `pipeline.evaluate.reachable`.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import SyntheticConfig, UserError
from pipeline.logs import chains, drifting, lasting
from pipeline.logs.shown import ShownRows

BEST = "best."  # begins the column of the log-odds


@dataclass(frozen=True)
class Planted:
    """Of every row, [rows] each."""

    category: np.ndarray  # int64, -1 where it is an everyday one
    action: np.ndarray  # int8, masked where unknown


def planted_action(cfg: SyntheticConfig) -> str | None:
    """The action that is planted beside the everyday ones."""
    if cfg.drifting is not None:
        return drifting.ACTION
    if cfg.chains is not None:
        return chains.ACTION
    return lasting.ACTION if cfg.lasting_categories else None


def plant_rows(
    cfg: SyntheticConfig,
    categories: np.ndarray,
    lengths: np.ndarray,
    owner: np.ndarray,
    place: np.ndarray,
    rng: np.random.Generator,
) -> Planted | None:
    """For the rows at `place` of their `owner`, one of `lengths`; `categories`, int64 [n]: those of
    the planted ones that have an item from the start. None where nothing is planted.

    Raises:
        UserError: too few items, so that a category of drifting tastes or of chains has none.
    """
    if knows_best(cfg) and len(categories) < cfg.planted_categories:
        without = cfg.planted_categories - len(categories)
        raise UserError(
            f"source.synthetic.num_items: {without} of {cfg.planted_categories} planted categories "
            f"have no item from the start, got {cfg.num_items}: set more"
        )
    if cfg.drifting is not None:
        number, action = drifting.plant(cfg.drifting, owner, place, rng)
    elif cfg.chains is not None:
        number, action = chains.plant(cfg.chains, lengths, owner, place, rng)
    elif cfg.lasting_categories:
        return Planted(*lasting.plant(cfg, categories, lengths, owner, place, rng))
    else:
        return None
    return Planted(cfg.num_categories + number, np.ma.masked_array(action, False))


def knows_best(cfg: SyntheticConfig) -> bool:
    """True where `best_log_odds` has an answer."""
    return cfg.drifting is not None or cfg.chains is not None


def best_log_odds(cfg: SyntheticConfig, rows: ShownRows, newest: int | None = None) -> np.ndarray:
    """Log-odds of the action of each row, float64 [rows], for somebody who knows how the logs are
    made, though not the dice, and has read the rows of earlier requests: all of them, or the
    `newest` alone.
    """
    per_request = cfg.candidates_per_request
    request_begin = rows.place // per_request * per_request
    oldest = np.zeros_like(request_begin)
    if newest is not None:
        oldest = np.maximum(request_begin - newest, 0)

    if cfg.drifting is not None:
        return drifting.best_log_odds(cfg.drifting, rows, request_begin, oldest)
    assert cfg.chains is not None, "knows_best"
    return chains.best_log_odds(cfg.chains, rows, request_begin, oldest)


def shown_rows(cfg: SyntheticConfig, log: pa.Table, category: np.ndarray) -> ShownRows:
    """The rows of `log` with their items' categories, int64 [rows], as the catalogue has them."""
    return ShownRows(
        user=log["user_id"].to_numpy(),
        place=log["tie_breaker"].to_numpy(),
        category=category - cfg.num_categories,
        action=log[str(planted_action(cfg))].to_numpy(zero_copy_only=False),
    )


def with_best(cfg: SyntheticConfig, log: pa.Table, category: np.ndarray) -> pa.Table:
    """`log` with the log-odds of its planted action beside it."""
    best = best_log_odds(cfg, shown_rows(cfg, log, category))
    return log.append_column(f"{BEST}{planted_action(cfg)}", pa.array(best))
