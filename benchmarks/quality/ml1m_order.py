"""MovieLens-1M as logs by order: each user's films in their order, the first 80 % to train on, the
next 10 % to choose by, the last 10 % to report.

    python -m benchmarks.quality.ml1m_order --data ~/ml-1m --out ~/ml-1m-order

`--data` holds ratings.dat and movies.dat as GroupLens has them
(https://files.grouplens.org/datasets/movielens/ml-1m.zip), or interactions.parquet and
items.parquet with columns user_id, item_id, position, rating_ge3 (1, 0, -1 unknown).

The times are no times: rows of a period are a second apart, and a period begins for all users at
once. So the gaps tell nothing of what comes later, and the split is one time for everybody.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from pipeline.config import parse_time

GOOD = 3  # stars
PERIODS = ("2001-01-01", "2001-03-01", "2001-05-01")  # training, validation, test
SHARES = (0.8, 0.9)  # of a user's rows: where validation and test begin


def order_log(
    user: np.ndarray, item: np.ndarray, position: np.ndarray, good: np.ndarray
) -> pa.Table:
    """LOG rows of ratings in any order; `position` is the place in a user's order, `good` 1, 0 or
    -1 for unknown, int64 [rows] each.

        position of a user of ten    0 … 7    8           9
        event_time                   training validation  test
    """
    order = np.lexsort((position, user))
    user, item, good = user[order], item[order], good[order]
    _, first, length = np.unique(user, return_index=True, return_counts=True)
    place = np.arange(len(user)) - np.repeat(first, length)

    # where each user's periods begin, [3, rows]; and the period of each row
    begins = np.floor(np.outer((0.0, *SHARES), length)).astype(np.int64)
    begins = np.repeat(begins, length, axis=1)
    period = (place >= begins).sum(axis=0) - 1
    within = place - begins[period, np.arange(len(user))]
    start = np.array([parse_time("", f"{day}T00:00:00+00:00") for day in PERIODS])
    return pa.table(
        {
            "user_id": user,
            "item_id": item,
            "event_time": start[period] + 1000 * within,
            "good": pa.array(good.clip(0).astype(np.int8), mask=good < 0),
        }
    )


def read_ratings(folder: Path) -> pa.Table:
    """The log of either form of the data."""
    ratings = folder / "ratings.dat"
    if not ratings.exists():
        table = pq.read_table(folder / "interactions.parquet")
        user, item = table["user_id"].to_numpy(), table["item_id"].to_numpy()
        return order_log(user, item, table["position"].to_numpy(), table["rating_ge3"].to_numpy())

    text = ratings.read_text().replace("::", "\t").encode()
    names = ["user_id", "item_id", "rating", "timestamp"]
    options = pc.ReadOptions(column_names=names)
    table = pc.read_csv(pa.py_buffer(text), options, pc.ParseOptions(delimiter="\t"))
    user, item, stars, time = (table[name].to_numpy() for name in names)
    position = np.empty(len(user), np.int64)
    # ties stay in the order of the file
    position[np.argsort(time, kind="stable")] = np.arange(len(user))
    return order_log(user, item, position, (stars >= GOOD).astype(np.int64))


def read_films(folder: Path) -> pa.Table:
    films = folder / "movies.dat"
    if not films.exists():
        return pq.read_table(folder / "items.parquet")
    rows = [line.split("::") for line in films.read_text("latin-1").splitlines()]
    item, title, genres = zip(*rows, strict=True)
    return pa.table({"item_id": [int(one) for one in item], "title": title, "genres": genres})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write log and items to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = read_ratings(options.data)
    pq.write_table(log, options.out / "log.parquet")
    pq.write_table(read_films(options.data), options.out / "items.parquet")
    print(f"log={options.out / 'log.parquet'} rows={log.num_rows}")


if __name__ == "__main__":
    main()
