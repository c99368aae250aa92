"""What the page says of items: how popular each one was, and its title and picture.

model's feature maps (exposures in training) ─┐
published item table (titles, pictures) ──────┴→ ItemFacts
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.batches.features import FeatureMaps
from pipeline.config import ServeConfig, UserError
from pipeline.sequences import store
from serve_app.page.schemas import ItemFacts


def check_columns(sequences: Path, settings: ServeConfig) -> None:
    """The published item table has the columns that the page is to show.

    Raises:
        UserError: it has not.
    """
    wanted = {
        "serve.page_title_column": settings.page_title_column,
        "serve.page_picture_column": settings.page_picture_column,
    }
    for key, name in wanted.items():
        if name is None:
            continue
        table = store.read_side_table(sequences, "items")
        known = [] if table is None else table.column_names
        if name not in known:
            raise UserError(f"{key}: the item table has no column {name!r}; it has {known}")


class TextColumn:
    """Texts of items by id.

    Args:
        table: `item_id`, rising, and the column; other columns are left alone.
        name: of the column; a value that is no text is written as one.
    """

    def __init__(self, table: pa.Table, name: str) -> None:
        self._ids = table["item_id"].to_numpy()
        self._values = table[name].combine_chunks()

    def find(self, codes: np.ndarray) -> list[str | None]:
        """The text of each item, None where it has none."""
        if len(self._ids) == 0:
            return [None] * len(codes)

        place = np.minimum(np.searchsorted(self._ids, codes), len(self._ids) - 1)
        row = pa.array(place, mask=self._ids[place] != codes)
        values = self._values.take(row).to_pylist()
        return [None if value is None else str(value) for value in values]


def published_column(sequences: Path, name: str | None) -> TextColumn | None:
    """The column of the published item table, None where none is asked for or there."""
    table = None if name is None else store.read_side_table(sequences, "items")
    if name is None or table is None or name not in table.column_names:
        return None
    return TextColumn(table, name)


class ItemCatalogue:
    """Facts of items by id; `maps` are those of the version that answers."""

    def __init__(
        self, maps: FeatureMaps, titles: TextColumn | None, pictures: TextColumn | None
    ) -> None:
        self.maps = maps
        self.titles = titles
        self.pictures = pictures
        self._sorted_counts = np.sort(maps.item_count[1:])

    def describe(self, codes: np.ndarray, own: list[int | str]) -> list[ItemFacts]:
        """Facts of the items with these codes, int64 [n]; `own` has the ids that people know."""
        num_shown = self._count_exposures(codes)
        percentile = self.percentiles(num_shown)
        is_known = self.maps.item_codes[self.maps.item_rows(codes), 0] > 0
        nothing: list[str | None] = [None] * len(codes)
        titles = nothing if self.titles is None else self.titles.find(codes)
        pictures = nothing if self.pictures is None else self.pictures.find(codes)

        facts = []
        for i, item_id in enumerate(own):
            share = float(percentile[i]) if num_shown[i] > 0 else None
            facts.append(
                ItemFacts(
                    item_id=item_id,
                    title=titles[i],
                    picture=pictures[i],
                    is_known=bool(is_known[i]),
                    num_shown=int(num_shown[i]),
                    percentile=share,
                )
            )
        return facts

    def _count_exposures(self, codes: np.ndarray) -> np.ndarray:
        """int64 [n]: exposures in the training period; none of an item that came after it."""
        rows = self.maps.item_rows(codes)
        return self.maps.item_count[np.where(rows < len(self.maps.item_count), rows, 0)]

    def percentiles(self, num_shown: np.ndarray) -> np.ndarray:
        """Share of the items that were shown less often, in percent; equals count half.

        counts of all items   0 1 1 5      num_shown   0     1    5
                                           percent    12.5  50   87.5
        """
        below = np.searchsorted(self._sorted_counts, num_shown, side="left")
        not_above = np.searchsorted(self._sorted_counts, num_shown, side="right")
        return 100 * (below + not_above) / 2 / max(len(self._sorted_counts), 1)

    def mixed_items(self, num: int) -> np.ndarray:
        """Codes of `num` items or all there are: half the most popular ones, half spread over the
        others, int64.

        A list of popular items alone would say little of a ranking.
        """
        by_popularity = self.maps.popular_items(len(self.maps.item_ids))
        half = (num + 1) // 2
        popular, others = by_popularity[:half], by_popularity[half:]
        if len(others) == 0:
            return popular
        places = np.linspace(0, len(others) - 1, num - half).round().astype(np.int64)
        return np.concatenate([popular, others[np.unique(places)]])
