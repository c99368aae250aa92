"""Packed keys sort as one sort per column does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sequences.packed_keys import argsort_rows, narrow_key, pack_rows, rank_rows

LAST = 2**63 - 1
KINDS = {
    "few": lambda rng, n: rng.integers(3, size=n),
    "times": lambda rng, n: 1_650_000_000_000 + rng.integers(2**31, size=n),
    "hashes": lambda rng, n: rng.integers(0, 2**63, size=n),
    "digests": lambda rng, n: rng.integers(0, 2**64, size=n, dtype=np.uint64),
    "close": lambda rng, n: 2**62 + rng.integers(100, size=n),  # hashes that agree in all high bits
    "signed": lambda rng, n: rng.choice([-(2**63), -1, 0, LAST], n),
    "nulls": lambda rng, n: np.where(rng.random(n) < 0.5, LAST, rng.integers(100, size=n)),
    "constant": lambda rng, n: np.full(n, LAST),
    "small": lambda rng, n: rng.integers(-2, 2, size=n).astype(np.int8),
}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6),
    st.integers(0, 60),
    st.integers(0, 2**32),
)
def test_rows_are_ordered_by_the_first_column_then_the_next(kinds: list[str], rows: int, seed: int):
    rng = np.random.default_rng(seed)
    columns = [KINDS[kind](rng, rows) for kind in kinds]
    plain = [column.tolist() for column in columns]
    expected = sorted(zip(*plain, strict=True))
    order = argsort_rows(columns)
    assert sorted(order.tolist()) == list(range(rows))
    assert [tuple(values[row] for values in plain) for row in order] == expected
    place = {row: number for number, row in enumerate(sorted(set(expected)))}
    assert rank_rows(columns).tolist() == [place[row] for row in zip(*plain, strict=True)]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_keys_of_one_column_compare_as_its_values(kind: str):
    values = KINDS[kind](np.random.default_rng(0), 50)
    key = pack_rows([values])
    assert ((key[:, None] < key) == (values[:, None] < values)).all()

    narrow = narrow_key(values)
    assert ((narrow[:, None] < narrow) == (values[:, None] < values)).all()
    assert int(narrow.max()) - int(narrow.min()) < 2**32
