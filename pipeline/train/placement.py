"""Where each embedding table of a model lives: whole on every rank, or in blocks of rows over all
ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import FeatureConfig, ModelConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class Placement:
    """One table: what it is, and which ranks hold which of its rows."""

    rows: int
    width: int
    sharded: bool
    world_size: int
    dtype: torch.dtype
    host_state: bool  # moments in the memory of the host, the rows on the device

    @property
    def block(self) -> int:
        """Rows of a rank: those of `torch.chunk`, so that the last ranks may hold fewer or none."""
        return -(-self.rows // self.world_size) if self.sharded else self.rows

    def span(self, rank: int) -> tuple[int, int]:
        """First row of `rank`, and the one after its last."""
        first = min(rank * self.block, self.rows) if self.sharded else 0
        return first, min(first + self.block, self.rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the largest block."""
        return self.block * self.width * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of the largest block: a float32 first moment per number, a second one per row."""
        return 4 * self.block * (self.width + 1)


def table_shapes(
    features: FeatureConfig, model: ModelConfig, vocab_sizes: dict[str, int]
) -> dict[str, tuple[int, int]]:
    """Rows and width of every table of the model, by the name it has in `train.tables`."""
    columns = *features.item.values(), *features.request.values(), *features.user.values()
    widths = features.item_id_dim, *(column.dim for column in columns)

    shapes = {}
    for name, width in zip(features.tables, widths, strict=True):
        shapes[name] = vocab_sizes[name], width

    # of a fixed size, and small: always replicated
    shapes["position"] = model.position_buckets, model.d_model
    shapes["time"] = model.time_buckets, model.d_model
    return shapes


def place_tables(
    features: FeatureConfig,
    model: ModelConfig,
    train: TrainConfig,
    vocab_sizes: dict[str, int],
    world_size: int,
) -> dict[str, Placement]:
    """The placement of every table of the model, by `train.tables` and its neighbours.

    two ranks, train.tables {item_id: sharded}
    item_id         5 rows of 8     rank 0 holds 0 .. 2, rank 1 holds 3 and 4
    user.age        4 rows of 2     both hold all
    """
    plan = {}
    for name, (rows, width) in table_shapes(features, model, vocab_sizes).items():
        grows = name in features.tables

        plan[name] = Placement(
            rows=rows,
            width=width,
            sharded=grows and _is_sharded(train, name, rows * width, world_size),
            world_size=world_size,
            dtype=torch.bfloat16 if name in train.bf16_tables else torch.float32,
            host_state=name in train.host_state_tables,
        )
    return plan


def _is_sharded(train: TrainConfig, name: str, numbers: int, world_size: int) -> bool:
    by_default = train.tables.get("default", "auto")
    placement = train.tables.get(name, by_default)
    if placement != "auto":
        return placement == "sharded"

    is_large = 4 * numbers > train.shard_above_mb * 2**20
    # the exchange is what brings bfloat16 rows to the batch as float32, with one rank too
    return (is_large and world_size > 1) or name in train.bf16_tables


def describe_tables(plan: dict[str, Placement]) -> dict[str, dict[str, Any]]:
    """The plan for `--dry-run`: where each table lives, what it takes, and the sums of a worker."""
    tables = {}
    total = {"table_weights": 0, "table_state": 0, "table_state_on_host": 0}
    for name, table in plan.items():
        tables[name] = {
            "rows": table.rows,
            "width": table.width,
            "dtype": str(table.dtype).removeprefix("torch."),
            "placement": "sharded" if table.sharded else "replicated",
            "rows_of_ranks": _name_spans(table) if table.sharded else "all",
            "weight_bytes": table.weight_bytes,
            "state_bytes": table.state_bytes,
            "state_on": "host" if table.host_state else "device",
        }

        state = "table_state_on_host" if table.host_state else "table_state"
        total["table_weights"] += table.weight_bytes
        total[state] += table.state_bytes
    return {"tables": tables, "total": total}


def _name_spans(table: Placement) -> str:
    """Few ranks all, of many the first two and the last: `0-499 | 500-998`."""
    named = []
    for rank in range(table.world_size):
        first, end = table.span(rank)
        named.append(f"{first}-{end - 1}" if end > first else "none")

    if len(named) > 4:
        named = [*named[:2], "…", named[-1]]
    return " | ".join(named)
