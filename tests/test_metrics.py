import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from pipeline.evaluate.metrics import TaskMetrics, auc, grouped_auc


def rows(
    seed: int = 0, num: int = 3000, users: int = 200
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=num), 1)  # many ties
    labels = rng.random(num) < 1 / (1 + np.exp(-logits))
    return logits, labels, rng.integers(0, users, num)


def test_ne_and_auc_are_sklearns():
    logits, labels, users = rows()
    metrics = TaskMetrics()
    metrics.add(logits, labels, users)
    result = metrics.result()
    rate = labels.mean()
    entropy = sklearn_log_loss(labels, np.full(len(labels), rate))
    assert result["ne"] == pytest.approx(
        sklearn_log_loss(labels, 1 / (1 + np.exp(-logits))) / entropy, abs=1e-12
    )
    assert result["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert result["rows"] == 3000


def test_gauc_is_the_mean_of_user_aucs_by_rows():
    logits, labels, users = rows(users=700)
    both = [u for u in np.unique(users) if 0 < labels[users == u].sum() < (users == u).sum()]
    areas = [roc_auc_score(labels[users == u], logits[users == u]) for u in both]
    weights = [(users == u).sum() for u in both]
    gauc, num_users, num_rows = grouped_auc(logits, labels, users)
    assert gauc == pytest.approx(np.average(areas, weights=weights), abs=1e-12)
    assert (num_users, num_rows) == (len(both), sum(weights))
    assert num_rows < len(labels)  # somebody was left out, so the case is tested


def test_merged_parts_equal_the_whole():
    logits, labels, users = rows()
    whole, left, right = TaskMetrics(), TaskMetrics(), TaskMetrics()
    whole.add(logits, labels, users)
    left.add(logits[:100], labels[:100], users[:100])
    right.add(logits[100:], labels[100:], users[100:])
    left.merge(right)
    assert left.result() == pytest.approx(whole.result(), abs=1e-12)


def test_base_rate_scores_have_ne_of_one_and_auc_of_one_half():
    labels = np.arange(10) < 3
    metrics = TaskMetrics()
    metrics.add(np.full(10, np.log(0.3 / 0.7)), labels, np.arange(10))
    assert metrics.result()["ne"] == pytest.approx(1)
    assert metrics.result()["auc"] == 0.5


def test_a_single_class_has_no_value():
    assert np.isnan(auc(np.arange(3.0), np.zeros(3, bool)))
    metrics = TaskMetrics()
    metrics.add(np.arange(3.0), np.zeros(3, bool), np.arange(3))
    assert np.isnan(metrics.result()["ne"])
    assert metrics.result()["gauc_users"] == 0
