"""The logs of a build, checked before any row of them is cleaned: every file's columns and types,
the first times of a few files, the columns that features name.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline import config
from pipeline.config import FeatureConfig, SequenceConfig, SourceConfig, UserError
from pipeline.logs import LogFiles, live_logs, open_logs
from pipeline.logs.cleaning import LogRules, check_columns, check_presence, find_text_ids
from pipeline.logs.files import CONNECTIONS
from pipeline.logs.parquet import count_reasons, refuse_unasked_columns
from pipeline.logs.rows import read_schema, rows_by_file
from pipeline.logs.time_check import check_times
from pipeline.schema import DAY_MS, TEXT_IDS
from pipeline.sequences.side_tables import check_feature_columns
from pipeline.sequences.sizes import fitting_buckets

logger = logging.getLogger(__name__)


def log_rules(
    source: SourceConfig, sequences: SequenceConfig, logs: LogFiles, num_buckets: int
) -> LogRules:
    """The rules that rows are checked by; without `sequences.latest_time`, a day from now on is too
    late.
    """
    earliest_ms = config.parse_time("sequences.earliest_time", sequences.earliest_time)
    if sequences.latest_time:
        latest_ms = config.parse_time("sequences.latest_time", sequences.latest_time)
    else:
        latest_ms = int(time.time() * 1000) + DAY_MS

    return LogRules(
        columns=logs.columns,
        events=source.events,
        earliest_ms=earliest_ms,
        latest_ms=latest_ms,
        num_buckets=num_buckets,
        readings=source.readings if source.kind == "parquet" else {},
        format=source.format,
    )


def check_logs(
    source: SourceConfig, sequences: SequenceConfig, features: FeatureConfig, run_dir: Path
) -> tuple[LogFiles, LogRules, dict[str, int]]:
    """The logs, the rules and the rows of each file: all files' columns and types checked, and the
    first times of a few files.

    Raises:
        UserError: a missing or mistyped column, or no rows at all.
    """
    logs = open_logs(source, run_dir)
    if logs.left_out:
        logger.warning("left out of the logs: %s", count_reasons(logs.left_out))

    ids = [logs.columns[name] for name in TEXT_IDS]
    named = [theirs for theirs in logs.columns.values() if theirs]
    rows_of_files = rows_by_file(logs.files, source.format, ids, named)
    rows = sum(rows_of_files.values())
    num_buckets = sequences.num_buckets or fitting_buckets(source, rows)
    rules = log_rules(source, sequences, logs, num_buckets)

    own: set[str] = set()
    if source.kind == "parquet":
        own = set(logs.files) - set(live_logs(run_dir))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        read = partial(read_schema, form=rules.format, ids=rules.id_columns)
        schemas = dict(zip(logs.files, pool.map(read, logs.files), strict=True))
    for file, schema in schemas.items():
        check_columns(schema, rules, file)
        if file in own:
            refuse_unasked_columns(schema, source, file)
    for name, files in check_presence(schemas, rules).items():
        logger.warning("%s: %d of %d files have no such column", name, files, len(schemas))

    text_ids = find_text_ids(schemas, rules)
    rules = replace(rules, events=replace(rules.events, text_ids=text_ids))

    if rows == 0:
        raise UserError(
            f"source.path: the logs are empty, 0 rows in {len(logs.files)} files ({logs.files[0]} "
            "…)"
        )
    check_times([file for file in logs.files if rows_of_files[file]], rules)
    if logs.users is not None:
        check_feature_columns("users", logs.users, features.user)
    if logs.items is not None:
        check_feature_columns("items", logs.items, features.item)
    return logs, rules, rows_of_files
