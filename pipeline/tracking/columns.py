"""The columns of MLflow's list of runs that tell trainings apart.

MLflow keeps a reader's own columns in the browser. What it takes from a server is a shared view: a
tag of the experiment, which an address names (`viewStateShareKey`). Its "Share" button makes such
tags; ours is written with every run, and `jobs.mlflow_ui` prints its address.
"""

import json
from collections.abc import Sequence

VIEW = "trainings"
TRAINING_PAGES = "workflowType=machine_learning"  # else a new browser shows the menu for agents
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
MOST_TASKS = 2  # a list is as wide as a screen
WIDTH = 104  # of a column, in pixels
# what MLflow shows before all others: its own names
FIRST = ("attributes.`Run Name`", "runDateAndNestInfo", "attributes.`Duration`")

PARAMS = ("model.encoder", "model.num_layers", "model.d_model")
SPEED = ("train/examples_per_s", "train/gflop_per_example")
TAGS = ("attempt",)


def shown_columns(tasks: Sequence[str]) -> list[str]:
    """Names of the columns, as MLflow writes them; of the metrics those of the first tasks.

    tasks       is_click, …
    columns     params.`model.encoder`, …, metrics.`val/ne/is_click`, …, tags.`attempt`
    """
    columns = [f"params.`{name}`" for name in PARAMS]
    for task in tasks[:MOST_TASKS]:
        for key in (f"val/ne/{task}", f"test/ne/{task}", f"test/auc/{task}"):
            columns.append(f"metrics.`{key}`")

    columns += [f"metrics.`{name}`" for name in SPEED]
    columns += [f"tags.`{name}`" for name in TAGS]
    return columns


def view_state(tasks: Sequence[str]) -> str:
    """The value of the tag `VIEW_TAG`: what is not in it stands at MLflow's default."""
    columns = shown_columns(tasks)
    state = {
        "selectedColumns": columns,
        "columnOrder": [*FIRST, *columns],
        "columnWidths": dict.fromkeys(columns, WIDTH),
    }
    return json.dumps(state)


def view_url(server: str, experiment_id: str) -> str:
    """Address of the list of an experiment's runs with these columns."""
    page = f"{server}/#/experiments/{experiment_id}/runs"
    return f"{page}?viewStateShareKey={VIEW}&{TRAINING_PAGES}"
