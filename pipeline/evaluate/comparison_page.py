"""A comparison as one HTML file that needs no other: table, differences, settings, curves, slices,
and quality beside what it cost.
"""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.config import UserError, flatten
from pipeline.evaluate.comparison import (
    LESS_IS_BETTER,
    METRICS,
    Difference,
    ScoredRows,
    compare_models,
    mean_over_tasks,
    measure_rows,
    read_scores,
    require_predictions,
    slice_rows,
)
from pipeline.evaluate.page_parts import embedded_picture, html_table, number_text, page_head
from pipeline.files import write_atomically

ITEM_RATE = "smoothed rate"  # the model that knows the item alone
# sections that do not decide what a model is
NOT_COMPARED = ("name", "runs_dir", "serve", "drift", "ray", "tracking", "checks", "index")
CURVES = {"train/loss": "training loss", "val_sample/ne": "validation NE while training"}
COSTS = {"train_seconds": "seconds of training", "mflop_per_example": "10⁶ FLOP an example"}
FEW_POINTS = 30  # of a curve: each is marked

# a cost, the metric of each line that it is the mean of, and their ratio
LOGGED_COSTS = (
    ("mflop_per_example", "train/gflop_per_example", 1000),
    ("examples_per_s", "train/examples_per_s", 1),
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run's folder says beside its predictions."""

    name: str
    settings: dict[str, Any]  # flattened
    costs: dict[str, float]  # steps, train_seconds, mflop_per_example, examples_per_s
    curves: dict[str, list[tuple[int, float]]]  # (step, value) of each metric of `CURVES`
    mlflow_run_id: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that the page shows. The first model is what the others are held against."""

    split: str
    samples: int
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    num_rows: int
    num_users: int
    facts: dict[str, RunFacts]  # of the models that are runs
    metrics: dict[str, dict[str, dict[str, float]]]  # model, metric, task
    differences: dict[str, dict[str, dict[str, Difference]]]  # model but the first, task, metric
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows, and AUC by model

    @property
    def run_ids(self) -> dict[str, str | None]:
        """MLflow's id of each model that is a run; None where it was not tracked."""
        return {name: facts.mlflow_run_id for name, facts in self.facts.items()}


def compare_runs(
    runs_dir: str,
    runs: Sequence[str],
    split: str,
    samples: int,
    item_rate: Callable[[ScoredRows], np.ndarray] | None = None,
) -> Comparison:
    """Runs of one `runs_dir` on the rows that all of them have scored, by their names.

    Args:
        item_rate: `item_rate_logits` of a training period, to be compared as well.

    Raises:
        UserError: a run that is not trained or not evaluated, or was on other rows.
    """
    folders = {name: Path(runs_dir).absolute() / name for name in runs}
    facts = {name: read_facts(name, folder) for name, folder in folders.items()}

    rows = read_scores(folders, split)
    if item_rate is not None:
        rows.logits[ITEM_RATE] = item_rate(rows)
    return make_comparison(rows, facts, split, samples)


def require_runs(runs_dir: str, runs: Sequence[str], split: str, *, scored: bool) -> None:
    """Say now what `compare_runs` would find later; `scored` where nothing is evaluated before it.

    Raises:
        UserError: a run that is not trained, or has no predictions of `split`.
    """
    for name in runs:
        folder = Path(runs_dir).absolute() / name
        require_model(name, folder)
        if scored:
            require_predictions(name, folder, split)


def require_model(name: str, folder: Path) -> None:
    """Go on only if the run has a model.

    Raises:
        UserError: it has none, or there is no such run.
    """
    model = folder / "model"
    if not folder.exists():
        raise UserError(f"run {name!r}: there is no folder {folder}")
    if not (model / "artifact.json").exists():
        raise UserError(f"run {name!r} has no model at {model}: train it first")


def write_page(folder: Path, comparison: Comparison) -> Path:
    """comparison.html, and comparison.json with its figures beside it; the path of the first."""
    page = folder / "comparison.html"
    write_atomically(page, render_page(comparison))
    figures = json.dumps(as_figures(comparison), indent=2, allow_nan=False)
    write_atomically(page.with_suffix(".json"), figures)
    return page


def read_facts(name: str, folder: Path) -> RunFacts:
    """Settings, costs and curves of a run.

    Raises:
        UserError: it has no model.
    """
    require_model(name, folder)
    model = folder / "model"
    extra = json.loads((model / "artifact.json").read_text())["extra"]
    settings = flatten(json.loads((model / "config.json").read_text()))

    lines: list[dict[str, float]] = []
    metrics = folder / "train" / "metrics.jsonl"
    if metrics.exists():
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return RunFacts(
        name=name,
        settings=settings,
        costs=_find_costs(extra, lines),
        curves=_find_curves(lines),
        mlflow_run_id=extra.get("mlflow_run_id"),
    )


def _find_costs(extra: Mapping[str, Any], lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the training took: from the model's notes, and as means of its metrics."""
    costs = {}
    for key in ("steps", "train_seconds"):
        if key in extra:
            costs[key] = float(extra[key])

    for key, logged, factor in LOGGED_COSTS:
        values = [line[logged] for line in lines if logged in line]
        if values:
            costs[key] = factor * sum(values) / len(values)
    return costs


def _find_curves(lines: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of `CURVES` that was logged.

    {step: 1, train/loss: .7}
    {step: 2, train/loss: .6, val_sample/ne: .9}

    train/loss       (1, .7) (2, .6)
    val_sample/ne    (2, .9)
    """
    curves = {}
    for key in CURVES:
        points = [(int(line["step"]), line[key]) for line in lines if key in line]
        if points:
            curves[key] = points
    return curves


def make_comparison(
    rows: ScoredRows, facts: Mapping[str, RunFacts], split: str, samples: int
) -> Comparison:
    """Metrics of all models, and the differences of each from the first."""
    first, *others = models = tuple(rows.logits)
    differences: dict[str, dict[str, dict[str, Difference]]] = {}
    for model in others:
        differences[model] = {}
        for task in rows.tasks:
            differences[model][task] = compare_models(rows, first, model, task, samples)

    slices = {}
    for name, inside in slice_rows(rows).items():
        part = rows.take(inside)
        by_model = {}
        for model in models:
            by_model[model] = mean_over_tasks(measure_rows(part, model)["auc"])
        slices[name] = {"rows": int(inside.sum()), "auc": by_model}

    return Comparison(
        split=split,
        samples=samples,
        models=models,
        tasks=rows.tasks,
        num_rows=len(rows.user_id),
        num_users=len(set(rows.user_id.tolist())),
        facts=dict(facts),
        metrics={model: measure_rows(rows, model) for model in models},
        differences=differences,
        slices=slices,
    )


def console_table(comparison: Comparison) -> str:
    """A line a model: mean AUC and NE, and how clearly they differ from the first one's."""
    width = max(len(model) for model in comparison.models)
    lines = [f"{'':{width}}   mean AUC   mean NE   clearly better / worse in (task metric)"]
    for model in comparison.models:
        metrics = comparison.metrics[model]
        auc, ne = mean_over_tasks(metrics["auc"]), mean_over_tasks(metrics["ne"])
        lines.append(f"{model:{width}}  {auc:9.4f} {ne:9.4f}   {_verdict(comparison, model)}")
    return "\n".join(lines)


def _is_better(metric: str, difference: Difference) -> bool:
    """True if a model that differs so is better than the first one."""
    return (difference.value < 0) == (metric in LESS_IS_BETTER)


def _verdict(comparison: Comparison, model: str) -> str:
    """In how many of all (task, metric) the model is clearly better, and clearly worse."""
    if model not in comparison.differences:
        return "what the others are held against"

    better, worse = 0, 0
    for by_metric in comparison.differences[model].values():
        for name, difference in by_metric.items():
            if not difference.is_clear:
                continue
            if _is_better(name, difference):
                better += 1
            else:
                worse += 1

    total = len(comparison.tasks) * len(METRICS)
    return f"{better} / {worse} of {total}"


def as_figures(comparison: Comparison) -> dict[str, Any]:
    """Metrics and differences as plain values, fit for JSON: what is not defined is null."""
    differences = {}
    for model, by_task in comparison.differences.items():
        for task, by_metric in by_task.items():
            for name, found in by_metric.items():
                differences[f"{model}/{name}/{task}"] = {
                    "value": _defined(found.value),
                    "low": _defined(found.low),
                    "high": _defined(found.high),
                }

    metrics = {}
    for model, by_metric in comparison.metrics.items():
        for name, by_task in by_metric.items():
            for task, value in by_task.items():
                metrics[f"{model}/{name}/{task}"] = _defined(value)

    return {
        "split": comparison.split,
        "samples": comparison.samples,
        "rows": comparison.num_rows,
        "users": comparison.num_users,
        "metrics": metrics,
        "differences": differences,
        "costs": {name: facts.costs for name, facts in comparison.facts.items()},
    }


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def render_page(comparison: Comparison) -> str:
    """The whole page."""
    first = comparison.models[0]
    title = html.escape(" · ".join(comparison.models))
    return f"""{page_head(title)}
<h1>{title}</h1>
<p>{comparison.num_rows:,} rows of {comparison.num_users:,} users, split {comparison.split}; every
model has scored the same rows. Tasks: {html.escape(", ".join(comparison.tasks))}.</p>
<h2>Quality and cost</h2>
{_quality_table(comparison)}
<h2>Differences from {html.escape(first)}</h2>
<p>With the interval that holds 95 % of {comparison.samples:,} paired bootstrap samples over users.
Grey: it holds 0, so the difference may be chance.</p>
{_difference_table(comparison)}
<h2>Settings that differ</h2>
{_settings_table(comparison.facts)}
<h2>Curves</h2>
{_curves(comparison.facts)}
<h2>Quality against cost</h2>
{_cost_plot(comparison)}
<h2>Slices</h2>
<p>Mean AUC over tasks.</p>
{_slice_table(comparison)}
</body></html>
"""


def _quality_table(comparison: Comparison) -> str:
    head = ["", "encoder", "layers", "width", "mean AUC", "mean NE", "mean GAUC"]
    head += ["steps", *COSTS.values(), "examples/s"]
    rows = []
    for model in comparison.models:
        facts = comparison.facts.get(model)
        settings = {} if facts is None else facts.settings
        costs = {} if facts is None else facts.costs

        row = [html.escape(model)]
        for key in ("model.encoder", "model.num_layers", "model.d_model"):
            row.append(html.escape(str(settings.get(key, "–"))))
        for name in ("auc", "ne", "gauc"):
            row.append(number_text(mean_over_tasks(comparison.metrics[model][name])))

        row.append(number_text(costs.get("steps"), ",.0f"))
        row.append(number_text(costs.get("train_seconds"), ",.1f"))
        row.append(number_text(costs.get("mflop_per_example"), ",.3f"))
        row.append(number_text(costs.get("examples_per_s"), ",.0f"))
        rows.append(row)
    return html_table(head, rows)


def _difference_table(comparison: Comparison) -> str:
    head = ["", "task", *(name.upper() for name in METRICS)]
    rows = []
    for model, by_task in comparison.differences.items():
        for task, by_metric in by_task.items():
            cells = [_difference_cell(name, by_metric[name]) for name in METRICS]
            rows.append([html.escape(model), html.escape(task), *cells])
    return html_table(head, rows)


def _difference_cell(metric: str, found: Difference) -> str:
    if not math.isfinite(found.value):
        return "–"

    kind = "unclear"
    if found.is_clear:
        kind = "better" if _is_better(metric, found) else "worse"
    low, high = number_text(found.low, "+.4f"), number_text(found.high, "+.4f")
    text = f"{found.value:+.4f} [{low}, {high}]"
    return f'<span class="{kind}">{text}</span>'


def differing_settings(facts: Mapping[str, RunFacts]) -> dict[str, dict[str, Any]]:
    """Keys on which the runs do not agree, with each run's value.

    one      train.lr: .01, model.d_model: 64
    other    train.lr: .02, model.d_model: 64
    found    train.lr: {one: .01, other: .02}
    """
    keys: dict[str, None] = {}
    for run in facts.values():
        keys |= dict.fromkeys(run.settings)

    found = {}
    for key in keys:
        if key.split(".")[0] in NOT_COMPARED:
            continue

        values = {name: run.settings.get(key) for name, run in facts.items()}
        distinct = {json.dumps(value, sort_keys=True) for value in values.values()}
        if len(distinct) > 1:
            found[key] = values
    return found


def _settings_table(facts: Mapping[str, RunFacts]) -> str:
    found = differing_settings(facts)
    if not found:
        return "<p>None.</p>"

    names = list(facts)
    rows = []
    for key, values in sorted(found.items()):
        cells = [html.escape(str(values[name])) for name in names]
        rows.append([f"<code>{html.escape(key)}</code>", *cells])
    return html_table(["", *_escaped(names)], rows)


def _escaped(names: Sequence[str]) -> list[str]:
    return [html.escape(name) for name in names]


def _slice_table(comparison: Comparison) -> str:
    rows = []
    for name, found in comparison.slices.items():
        cells = [number_text(found["auc"][model]) for model in comparison.models]
        rows.append([name, f"{found['rows']:,}", *cells])
    return html_table(["", "rows", *_escaped(comparison.models)], rows)


def _curves(facts: Mapping[str, RunFacts]) -> str:
    shown = [key for key in CURVES if any(key in run.curves for run in facts.values())]
    if not shown:
        return "<p>No run has any.</p>"

    figure = Figure(figsize=(5.5 * len(shown), 3.5), layout="constrained")
    for place, key in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        for name, run in facts.items():
            if key not in run.curves:
                continue
            steps, values = zip(*run.curves[key], strict=True)
            marker = "." if len(steps) < FEW_POINTS else None
            axes.plot(steps, values, label=name, marker=marker)
        axes.set(xlabel="step", title=CURVES[key])
        axes.legend()
    return embedded_picture(figure, "curves by step")


def _cost_plot(comparison: Comparison) -> str:
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    for place, (key, words) in enumerate(COSTS.items(), 1):
        axes = figure.add_subplot(1, len(COSTS), place)
        for model in comparison.models:
            auc = mean_over_tasks(comparison.metrics[model]["auc"])
            facts = comparison.facts.get(model)
            if facts is None:
                axes.axhline(auc, linestyle=":", color="grey", label=model)
            elif key in facts.costs:
                axes.plot(facts.costs[key], auc, "o", label=model)
        axes.set(xlabel=words, ylabel="mean AUC")
        axes.legend()
    return embedded_picture(figure, "mean AUC against cost")
