"""A report's counts with the ids that people have, where those are text."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.schema import NAMED_IDS
from pipeline.sequences.dictionary import texts_of
from pipeline.sequences.quality.statistics import DOUBLES, Statistics
from pipeline.sequences.store import Bucket


def name_ids(
    folder: Path,
    dictionaries: Mapping[str, Mapping[str, Bucket]],
    totals: Statistics,
    num_chunks: int,
) -> Statistics:
    """The counts with texts in the place of codes: of the users with the most rows, and in the rows
    that stand for their double. Other rows of the quarantine are as they came.
    """
    if not dictionaries:
        return totals

    def named(column: str, codes: list[int]) -> list[Any]:
        chunks = dictionaries.get(column)
        if chunks is None:
            return codes
        texts = texts_of(folder, chunks, np.array(codes, np.int64), num_chunks)
        return texts.to_pylist()

    users = named("user_id", list(map(int, totals.heaviest)))
    heaviest = dict(zip(map(str, users), totals.heaviest.values(), strict=True))

    samples = dict(totals.samples)
    for reason in DOUBLES:
        rows = []
        for sample in samples.get(reason, []):
            row = dict(sample["row"])
            for column in NAMED_IDS:
                (row[column],) = named(column, [row[column]])
            rows.append(sample | {"row": row})
        if rows:
            samples[reason] = rows
    return replace(totals, heaviest=heaviest, samples=samples)
