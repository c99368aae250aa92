"""Champion, canary and shadow in one replica, without Ray."""

import asyncio
import gc
import json
import re
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError, RunConfig, UserError
from pipeline.files import folder_digests
from pipeline.tracking import PinnedModel
from serve_app import deployment, metrics
from serve_app.app import Ranking
from serve_app.columns import RankColumns, RankedColumns
from serve_app.metrics import ReplicaMetrics, exposition_text
from serve_app.ranking import rollout
from serve_app.ranking.history_cache import resident_bytes
from serve_app.ranking.ranker import Ranker
from serve_app.ranking.rollout import CANARY, CHAMPION, SHADOW, Rollout, in_share
from serve_app.schemas import RankHead, Refusal
from tests.support.exposition import sample
from tests.worlds.tiny import index_model, publish_sequences, save_tiny_model, tiny_config

ROOT = Path(__file__).parent.parent
PATIENCE_S = 30
NAMES = re.compile(r"ranking_\w+")
SUFFIX = re.compile(r"_(total|bucket|count|sum)$")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[PinnedModel]]:
    """Three versions in the server's cache, as if they had been fetched."""
    cfg = tiny_config(tmp_path_factory.mktemp("rollout") / "runs")
    publish_sequences(cfg)
    models = []
    for version in (1, 2, 3):
        cache = deployment.cache_folder(cfg.runs_dir)
        folder = save_tiny_model(cfg, cache / "new", seed=version)
        index_model(cfg, folder)
        digests = folder_digests(folder)
        model = PinnedModel("http://127.0.0.1:1", "tiny", version, digests)
        folder.rename(cache / model.folder_name)
        models.append(model)
    return cfg, models


def loaded(world, canary=None, shadow=None, share=0.3, earlier=None, counts=None) -> Rollout:
    cfg, models = world
    sections = {
        "port": 0,
        "canary": {"version": models[canary].version, "share": share} if canary else None,
    }
    cfg = tiny_config(Path(cfg.runs_dir), serve=sections)
    on_trial = [None if i is None else models[i] for i in (canary, shadow)]
    return rollout.load_rollout(
        deployment.user_config(cfg.folders, cfg.serve, models[0], *on_trial),
        counts or ReplicaMetrics(),
        earlier,
    )


def test_histories_that_graphs_read_are_not_kept_beside_others(world) -> None:
    """An update that turns graphs on meets entries whose pages a graph's room cannot take."""
    cfg, models = world
    first = loaded(world)
    wanted = deployment.user_config(cfg.folders, cfg.serve, models[0])
    folder, limits = Path(wanted["serving"]), rollout.read_limits(wanted["limits"])
    assert rollout._find_shared(limits, folder, first) is first.shared

    # on a GPU already, without graphs
    first.shared = launched = rollout._find_shared(replace(limits, use_gpu=True), folder, first)
    graphed = rollout._find_shared(replace(limits, use_gpu=True, cuda_graphs=True), folder, first)
    assert graphed.budget is not launched.budget
    assert graphed.budget.pages.for_rooms and not launched.budget.pages.for_rooms


def asking(user: int | None, **values: object) -> RankColumns:
    who = {"history": []} if user is None else {"user_id": user}
    return RankColumns(RankHead.model_validate(who | values), np.array([1, 7, 9]), {})


def test_a_share_of_the_users_and_always_the_same() -> None:
    users = range(10_000)
    small, large, other = (
        {u for u in users if in_share(u, version, share)}
        for version, share in ((4, 0.1), (4, 0.3), (5, 0.1))
    )
    assert len(small) == pytest.approx(1000, abs=150)
    assert len(large) == pytest.approx(3000, abs=250)
    assert small < large, "a growing canary keeps its users"
    assert len(small & other) < 200, "another version is tried on other users"


def test_a_replica_that_starts_after_an_append_without_a_deploy_says_so(
    world, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, models = world
    wanted = deployment.user_config(cfg.folders, cfg.serve, models[0])
    with caplog.at_level("WARNING", logger="ray.serve"):
        rollout.load_rollout(wanted, ReplicaMetrics())
        assert "published anew" not in caplog.text
        rollout.load_rollout(wanted | {"digest": "0" * 64}, ReplicaMetrics())
    assert "published anew since the server was deployed" in caplog.text


def test_the_canary_answers_its_users_and_nobody_else(world) -> None:
    counts = ReplicaMetrics()
    both = loaded(world, canary=1, counts=counts)
    requests = [asking(user) for user in range(24)] + [asking(None), asking(3, order_by="is_sold")]
    answers = both.rank(requests)
    assert isinstance(answers[-1], Refusal)
    assert all(isinstance(answer, RankedColumns) for answer in answers[:-1])
    versions = [answer.model_version for answer in answers[:-1]]  # pyright: ignore[reportAttributeAccessIssue]
    assert versions == [2 if in_share(user, 2, 0.3) else 1 for user in range(24)] + [1]
    assert set(versions) == {1, 2}

    for role, version in ((CHAMPION, 1), (CANARY, 2)):  # each as if it were alone
        ranker = both.rankers[role]
        mine = [i for i, answered in enumerate(versions) if answered == version]
        for i, alone in zip(mine, ranker.rank([requests[i] for i in mine]), strict=True):
            assert answers[i].response() == alone.response()  # pyright: ignore[reportAttributeAccessIssue]

    text = exposition_text(counts.registry).decode()
    assert sample(
        text, "ranking_ranker_requests_total", version="2", role="canary"
    ) == versions.count(2)
    assert sample(
        text, "ranking_ranker_requests_total", version="1", role="champion"
    ) == versions.count(1)
    assert sample(text, "ranking_ranker_candidates_total") == 3 * 25


def finished(what, expected: float) -> None:
    for _ in range(500):
        if what() == expected:
            return
        time.sleep(0.01)
    raise AssertionError(f"{what()} instead of {expected}")


def test_the_shadow_is_compared_and_never_seen(world) -> None:
    counts = ReplicaMetrics()
    shadowed = loaded(world, shadow=2, counts=counts)
    requests = [asking(user) for user in range(10)]
    answers = shadowed.rank(requests)
    assert {answer.model_version for answer in answers} == {1}  # pyright: ignore[reportAttributeAccessIssue]
    counted = lambda: sample(
        exposition_text(counts.registry).decode(), "ranking_shadow_score_change_count"
    )
    finished(counted, 10)

    text = exposition_text(counts.registry).decode()
    other = shadowed.rankers[SHADOW].rank(requests)
    changes = [
        max(np.abs(np.subtract(a.scores[t], b.scores[t])).max() for t in a.scores)  # pyright: ignore
        for a, b in zip(answers, other, strict=True)
    ]
    assert min(changes) > 0
    assert sample(text, "ranking_shadow_score_change_sum", version="3") == pytest.approx(
        sum(changes)
    )

    same = sum(a.order[0] == b.order[0] for a, b in zip(answers, other, strict=True))  # pyright: ignore
    assert sample(text, "ranking_shadow_same_best_total") == same
    assert sample(text, "ranking_ranker_requests_total", role="shadow") == 10
    shadowed.close()


def test_a_shadow_that_fails_or_lags_harms_nobody(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SHADOW_QUEUE", 3)
    counts, release = ReplicaMetrics(), threading.Event()
    shadowed = loaded(world, shadow=2, counts=counts)
    monkeypatch.setattr(
        shadowed.rankers[SHADOW], "score_requests", lambda requests: release.wait(60) and 1 / 0
    )

    answers = [shadowed.rank([asking(user)])[0] for user in range(8)]
    assert all(isinstance(answer, RankedColumns) for answer in answers)

    dropped = sample(exposition_text(counts.registry).decode(), "ranking_shadow_dropped_total")
    assert dropped in (4, 5)  # three wait; the thread may have taken one more

    release.set()
    finished(
        lambda: sample(exposition_text(counts.registry).decode(), "ranking_shadow_failed_total"),
        8 - dropped,
    )
    shadowed.close()


def test_a_shadow_whose_scores_are_no_numbers_has_failed(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = ReplicaMetrics()
    shadowed = loaded(world, shadow=2, counts=counts)
    shadow = shadowed.rankers[SHADOW]
    score = shadow.score_requests

    def score_broken(prepared: list) -> list[RankedColumns]:
        answers = score(prepared)
        answers[1].scores["is_like"][0] = np.nan
        return answers

    monkeypatch.setattr(shadow, "score_requests", score_broken)
    shadowed.rank([asking(user) for user in range(4)])
    text = lambda: exposition_text(counts.registry).decode()
    finished(lambda: sample(text(), "ranking_shadow_failed_total"), 1)
    finished(lambda: sample(text(), "ranking_shadow_score_change_count"), 3)
    assert sample(text(), "ranking_shadow_score_change_sum", version="3") > 0
    shadowed.close()


def test_a_version_that_is_loaded_keeps_what_it_has_cached(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loaded(world, canary=1)
    first.rank([asking(user) for user in range(5)])
    monkeypatch.setattr(
        rollout, "load_indexed", lambda folder, device: pytest.fail("nothing new is to be loaded")
    )

    wider = loaded(world, canary=1, share=0.9, earlier=first)
    assert wider.rankers == first.rankers
    assert wider.share == 0.9

    alone = loaded(world, earlier=first)
    assert list(alone.rankers) == [CHAMPION]

    info = wider.model_info()
    assert (info.model_version, info.canary_version, info.canary_share) == (1, 2, 0.9)
    assert info.shadow_version is None
    assert alone.model_info().canary_version is None


def test_versions_share_one_budget_of_memory(world) -> None:
    both = loaded(world, canary=1)
    for ranker in both.rankers.values():
        ranker.rank([asking(user) for user in range(6)])
    champion, canary = (both.rankers[role].caches for role in (CHAMPION, CANARY))
    budget = champion.budget
    assert canary.budget is budget
    assert budget.num_bytes == champion.num_bytes + canary.num_bytes
    entries = budget.entries.values()
    sizes = [resident_bytes(len(entry.pages), len(entry.layers)) for entry in entries]
    assert budget.num_bytes == sum(sizes)

    # the canary's new histories push the oldest out, which are the champion's
    budget.max_bytes = budget.num_bytes
    both.rankers[CANARY].rank([asking(user) for user in range(6, 12)])
    assert champion.evictions > 0
    assert budget.num_bytes <= budget.max_bytes

    alone = loaded(world, earlier=both)
    both.close(alone)
    assert budget.num_bytes == champion.num_bytes > 0
    assert alone.shared is both.shared
    both.rankers[CANARY].rank([asking(3)])
    assert canary.num_bytes == 0, "a version that is gone keeps nothing"


def test_updates_leave_no_open_files(world) -> None:
    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    cfg, models = world
    current = loaded(world)
    for round_ in range(8):
        if round_ == 2:
            before = num_open()
        limits = tiny_config(Path(cfg.runs_dir), serve={"port": 0, "micro_batch": 100 + round_})
        wanted = deployment.user_config(limits.folders, limits.serve, models[round_ % 3])
        after = rollout.load_rollout(wanted, ReplicaMetrics(), current)
        current.close(after)
        current = after
    assert num_open() <= before


def test_collections_leave_out_the_first_versions_which_go_all_the_same(world) -> None:
    """A version has so many objects that full collections would hold up passes; it must be in no
    cycle then, or an update would never give its memory back.
    """
    cfg, models = world
    served = tiny_config(Path(cfg.runs_dir), serve={"port": 0})
    ranking = Ranking()

    async def main() -> None:
        await ranking.reconfigure(deployment.user_config(served.folders, served.serve, models[0]))
        assert not any(isinstance(one, Ranker) for one in gc.get_objects())
        first = weakref.ref(ranking.rollout.champion)  # pyright: ignore[reportOptionalMemberAccess]

        await ranking.reconfigure(deployment.user_config(served.folders, served.serve, models[1]))
        assert ranking.loading is not None
        await ranking.loading
        assert (await ranking.model_info()).model_version == 2
        end = time.monotonic() + PATIENCE_S
        while first() is not None and time.monotonic() < end:  # the loading thread lets go of it
            await asyncio.sleep(0.01)
        assert first() is None

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
        gc.unfreeze()


def test_the_log_names_device_kernels_and_formats(world, caplog: pytest.LogCaptureFixture) -> None:
    cfg, models = world
    with caplog.at_level("INFO", logger="ray.serve"):
        loaded(world)
        for formats in ({"precision": "bf16", "fp8": True}, {"int4_tables": True}):
            limits = tiny_config(Path(cfg.runs_dir), serve={"port": 0, **formats})
            rollout.load_rollout(
                deployment.user_config(limits.folders, limits.serve, models[1]), ReplicaMetrics()
            )
    assert [message for message in caplog.messages if "ready" in message] == [
        "tiny version 1 ready: cpu, torch kernels, fp32",
        "tiny version 2 ready: cpu, torch kernels, bf16 with FP8",
        "tiny version 2 ready: cpu, torch kernels, fp32, INT4 tables",
    ]


def test_settings_of_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for section, said in (
        ({"canary": {"version": 1, "share": 1.5}}, r"serve\.canary\.share.*1\.5"),
        ({"canary": {"version": 0}}, r"serve\.canary\.version.*0"),
        ({"shadow": 0}, r"serve\.shadow.*0"),
        ({"max_wait_ms": 0}, r"serve\.max_wait_ms.*0"),
        ({"request_timeout_s": -1}, r"serve\.request_timeout_s.*-1"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny_config(tmp_path, serve=section)
    for section, key in (
        ({"canary": {"version": 3}}, "serve.canary.version"),
        ({"shadow": 3}, "serve.shadow"),
    ):
        cfg = tiny_config(tmp_path, serve=section)
        model = PinnedModel("", "tiny", 3, {})
        with pytest.raises(UserError, match=f"{key}: version 3 is the champion"):
            deployment.deploy_model(cfg.folders, cfg.serve, "", model)


def test_the_loaded_versions_and_their_caches_are_on_the_page(world) -> None:
    counts = ReplicaMetrics()
    both = loaded(world, canary=1, counts=counts)
    counts.loaded.roles = both.rankers
    both.rank([asking(user) for user in range(12)])
    both.rank([asking(user) for user in range(12)])
    text = exposition_text(counts.registry).decode()
    assert sample(text, "ranking_model", version="2", role="canary") == 1
    for role, ranker in both.rankers.items():
        assert isinstance(ranker, Ranker)
        stats = ranker.cache_stats()
        assert (
            sample(text, "ranking_history_cache_hits_total", role=role)
            == stats["history_cache_hits"]
        )
        assert (
            sample(text, "ranking_history_cache_bytes", role=role) == stats["history_cache_bytes"]
        )
    assert sample(text, "ranking_history_cache_hits_total") > 0


def test_the_dashboard_asks_for_what_the_page_holds(world) -> None:
    """Every metric that a panel of deploy/grafana names is on the page, and every metric on the
    page is in a panel.
    """
    replica = ReplicaMetrics()
    replica.loaded.roles = loaded(world).rankers
    own = exposition_text(metrics.IngressMetrics().registry)
    texts = {"one": exposition_text(replica.registry)}
    page = metrics.metrics_page({"own": own}, texts).decode()
    families = set(re.findall(r"^# TYPE (ranking_\w+)", page, re.MULTILINE))
    families = {name.removesuffix("_total") for name in families if not name.endswith("_created")}

    dashboard = json.loads((ROOT / "deploy" / "grafana" / "ranking.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in NAMES.findall(target["expr"])
    }
    assert {SUFFIX.sub("", name) for name in asked} == families - {"ranking_history_cache_entries"}
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(places) == len(set(places))
