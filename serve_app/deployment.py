"""Starting and updating the server by configuration: one PUT to the dashboard, then waiting for the
new version alone.

The same on a cluster of the job's own and on one that it was submitted to. Replicas of an update
keep their process: only `user_config` changes.
"""

import asyncio
import dataclasses
import errno
import json
import logging
import socket
import time
import uuid
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import yaml

from pipeline import config
from pipeline.cluster import free_port
from pipeline.config import Outage, RunFolders, ServeConfig, UserError
from pipeline.files import make_private_folder, staged_file, write_atomically
from pipeline.index.folder import load_indexed
from pipeline.model.artifact import LoadedModel
from pipeline.sequences import store
from pipeline.tracking import PinnedModel, fetch_model, find_version
from pipeline.waiting import certificates, wait_until
from serve_app.page.catalogue import check_columns
from serve_app.web.protection import read_keys
from serve_app.web.tracing import make_tracer

logger = logging.getLogger(__name__)

APPLICATION = "ranking"
POLL_S = 0.1
LOOK_EVERY_S = 2.0  # at what Serve wants, while an update loads
PORT_WAIT_S = 15.0  # a server that has just been stopped takes a moment to let go
SEND_TRIES = 3
SEND_PAUSE_S = 2.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# where a server on Kubernetes listens: KubeRay's services expect it there
POD_OPTIONS: dict[str, Any] = {"host": "0.0.0.0", "port": 8000}
# requests in flight of one process that autoscaling aims at
INGRESS_TARGET, RANKER_TARGET = 16, 4
ANSWERS = 3  # in a row from the new version alone, before the old one counts as gone


def cache_folder(runs_dir: str) -> Path:
    """Where checked model files lie on every node that serves."""
    return Path(runs_dir).absolute() / "champions"


def read_template() -> dict[str, Any]:
    """serve_config.yaml as it is in the package."""
    return yaml.safe_load(resources.files("serve_app").joinpath("serve_config.yaml").read_text())


def user_config(
    folders: RunFolders,
    settings: ServeConfig,
    model: PinnedModel,
    canary: PinnedModel | None = None,
    shadow: PinnedModel | None = None,
) -> dict[str, Any]:
    """What a replica needs to load its versions; `ranking.rollout.load_rollout` reads it."""
    return {
        # names this update, so that its success or failure can be told from others'
        "deployment": uuid.uuid4().hex,
        "model": dataclasses.asdict(model),
        "canary": None if canary is None else dataclasses.asdict(canary),
        "shadow": None if shadow is None else dataclasses.asdict(shadow),
        "sequences": str(folders.sequence_dir),
        "digest": store.read_manifest(folders.sequence_dir).digest,
        "cache": str(cache_folder(folders.runs_dir)),
        # the mapped copy of the sequences, and the events since
        "serving": str(make_serving_folder(folders.run_dir)),
        "limits": config.to_dict(settings),
    }


def serve_config(
    settings: ServeConfig, wanted: dict[str, Any], port: int, runtime_env: dict[str, Any]
) -> dict[str, Any]:
    """serve_config.yaml with everything put in."""
    filled = read_template()
    filled["http_options"] |= {"host": settings.host, "port": port}
    (application,) = filled["applications"]
    application["runtime_env"] = runtime_env

    keys_file = settings.api_keys_file
    rate_limit = settings.rate_limit_per_s
    if rate_limit is not None and not settings.one_process:
        rate_limit /= settings.num_ingress  # HAProxy deals requests out evenly
    application["args"] |= {
        "one_process": settings.one_process,
        "max_body_bytes": settings.max_body_bytes,
        "api_keys_file": None if keys_file is None else str(Path(keys_file).absolute()),
        "rate_limit_per_s": rate_limit,
        "max_wait_ms": settings.max_wait_ms,
        "request_timeout_s": settings.request_timeout_s,
        "body_timeout_s": settings.body_timeout_s,
        "max_candidates": settings.max_candidates,
        "max_history": settings.max_history,
        "max_rank_users": settings.max_rank_users,
        "max_recommend_users": settings.max_recommend_users,
        "hosts": _local_names(settings),
        "trace_context": settings.trace_context,
        "otlp_endpoint": settings.otlp_endpoint,
        "served_log": served_log_arguments(settings, wanted["serving"]) if wanted else None,
        "page": _page(settings),
        "server_id": read_server_id(Path(wanted["serving"])) if wanted else None,
    }

    ingress, ranker = application["deployments"]
    ingress |= _number_of_processes(settings.num_ingress, settings.max_ingress, INGRESS_TARGET)
    ranker |= _number_of_processes(settings.num_replicas, settings.max_replicas, RANKER_TARGET)
    ranker["user_config"] = wanted
    ranker["ray_actor_options"] |= {"num_gpus": int(settings.use_gpu)}
    if settings.one_process:
        # it takes the ingress' place: as many requests at once, and nobody to be routed to
        for name in ("max_ongoing_requests", "max_queued_requests"):
            ranker[name] = ingress[name]
        del ranker["request_router_config"]
        application["deployments"] = [ranker]
    return filled


def served_folder(settings: ServeConfig, run_dir: Path) -> str:
    """Where the served log of a run lies: a folder or s3://…"""
    return settings.served_folder or str(run_dir / "serving" / "served")


def served_log_arguments(settings: ServeConfig, serving: str) -> dict[str, Any] | None:
    """`feedback.served_log.ServedLogSettings` of the ingresses."""
    if not settings.served_log or settings.served_share == 0:
        return None
    return {
        "folder": settings.served_folder or f"{serving}/served",
        "share": settings.served_share,
        "histories": settings.served_histories,
        "places": settings.served_places,
        "days": settings.served_days,
        "flush_s": settings.served_flush_s,
    }


def has_page(settings: ServeConfig) -> bool:
    """Tell whether there is a page at /; it shows what users did to whoever may ask."""
    if settings.page == "auto":
        return _is_local(settings)
    return settings.page == "on"


def _page(settings: ServeConfig) -> dict[str, Any] | None:
    """`web.page.routes.PageSettings` of the ingresses."""
    if not has_page(settings):
        return None
    return {"picture_hosts": list(settings.page_picture_hosts)}


def _is_local(settings: ServeConfig) -> bool:
    """True for a server without keys that only this machine reaches."""
    return settings.api_keys_file is None and settings.host in LOOPBACK


def _local_names(settings: ServeConfig) -> list[str] | None:
    """The names that requests may call a keyless server of this machine by; None: no such
    server.
    """
    return [*LOOPBACK, *settings.allowed_hosts] if _is_local(settings) else None


def _number_of_processes(least: int, most: int | None, target: int) -> dict[str, Any]:
    """Serve's settings for a fixed number of processes, or for one that follows the load."""
    if most is None:
        return {"num_replicas": least}
    limits = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
    return {"num_replicas": None, "autoscaling_config": limits}


def deploy_model(
    folders: RunFolders, settings: ServeConfig, dashboard_url: str, model: PinnedModel
) -> str:
    """Serve `model` on the cluster behind `dashboard_url`; returns the server's address once only
    `model` answers.

    Ray must be initialised: replicas get the code of this job.

    Raises:
        UserError: the version does not load.
        Outage: nothing answered in time, or another update has come meanwhile.
    """
    url = send_update(settings, dashboard_url, _checked(folders, settings, model))
    _remember_champion(folders.runs_dir, model)
    return url


def end_server(settings: ServeConfig) -> None:
    """Let what is in flight be answered and nothing more in, then end the server's processes.

    Where a mistake was told before there was a server, as of a canary that is not registered, there
    is none to end.
    """
    from ray import serve

    if APPLICATION not in serve.status().applications:
        return

    ingress = "RankerReplica" if settings.one_process else "Api"
    longest_s = settings.request_timeout_s + 1

    async def drain() -> list[int]:
        handle = serve.get_deployment_handle(ingress, APPLICATION)
        return await handle.broadcast("drain").results_async(timeout_s=longest_s)

    try:
        left = sum(asyncio.run(drain()))
    except Exception as error:  # half of a server has to end all the same
        logger.warning("the server ends without draining: %s", error)
    else:
        logger.info("requests that were not answered in time: %d", left)

    # its router goes on asking the loop that has drained, and calls that an error
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    serve.delete(APPLICATION)


def make_serving_folder(run_dir: Path) -> Path:
    """The server's folder of a run, for its user alone: it holds what users did."""
    folder = run_dir / "serving"
    make_private_folder(folder)
    return folder


def read_server_id(folder: Path) -> str:
    """Name of the server that keeps its events in `folder`; the first that asks makes it up.

    It stays the same whatever the server is updated to, so that no ingress starts anew for it.
    """
    path = folder / "server-id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex)
    return path.read_text()


def _remember_champion(runs_dir: str, model: PinnedModel) -> None:
    """Note what is served, for a start without MLflow; its files are in the cache."""
    note = cache_folder(runs_dir) / f"{model.name}.json"
    with staged_file(note) as stage:
        stage.write_text(json.dumps(dataclasses.asdict(model)))


def rename_champions(runs_dir: str, renamed: Mapping[str, PinnedModel]) -> None:
    """Let the notes name what cached versions hold now; `renamed` by the old names of folders."""
    for note in cache_folder(runs_dir).glob("*.json"):
        served = PinnedModel(**json.loads(note.read_text()))
        now = renamed.get(served.folder_name)
        if now is not None:
            _remember_champion(runs_dir, dataclasses.replace(served, sha256=now.sha256))


def recall_champion(runs_dir: str, model_name: str) -> PinnedModel | None:
    """What `deploy_model` served last of this model name, None where that is not known."""
    note = cache_folder(runs_dir) / f"{model_name}.json"
    try:
        return PinnedModel(**json.loads(note.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def fill_rayservice(
    folders: RunFolders, settings: ServeConfig, manifest: Path, model: PinnedModel
) -> str:
    """KubeRay's RayService in the file `manifest`, with the configuration that serves `model` put
    in, as YAML.

    Pods find the sequences and the model under the same `runs_dir`, and their code in the image.

    Raises:
        UserError: `manifest` holds no RayService, or the version does not load.
    """
    try:
        document = yaml.safe_load(manifest.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--rayservice {manifest} cannot be read: {error}") from None

    if not isinstance(document, dict) or document.get("kind") != "RayService":
        raise UserError(f"--rayservice {manifest} holds no RayService")

    # every pod of the cluster may reach it, whatever address the configuration names
    host, port = POD_OPTIONS["host"], POD_OPTIONS["port"]
    in_pods = dataclasses.replace(settings, host=host)
    filled = serve_config(in_pods, _checked(folders, in_pods, model), port, {})
    document["spec"]["serveConfigV2"] = yaml.safe_dump(filled, sort_keys=False)
    return yaml.safe_dump(document, sort_keys=False)


def _checked(folders: RunFolders, settings: ServeConfig, model: PinnedModel) -> dict[str, Any]:
    """The replicas' `user_config`; what cannot be loaded fails here, before anything is touched."""
    check_protection(settings)
    check_columns(folders.sequence_dir, settings)
    if settings.trace_context:
        make_tracer(settings.otlp_endpoint)  # raises where the packages are missing
    canary, shadow = _on_trial(settings, model)
    for version in (model, canary, shadow):
        if version is not None:
            loaded, _ = load_indexed(fetch_model(version, cache_folder(folders.runs_dir)))
            _refuse_broken_weights(loaded, version)
    return user_config(folders, settings, model, canary, shadow)


def _refuse_broken_weights(loaded: LoadedModel, version: PinnedModel) -> None:
    for name, weight in loaded.model.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(
                f"{version.name} version {version.version} is not served: {name} holds numbers "
                "that are not finite"
            )


def _on_trial(
    serve: ServeConfig, champion: PinnedModel
) -> tuple[PinnedModel | None, PinnedModel | None]:
    """The canary and the shadow that the configuration names, if any."""
    canary = None if serve.canary is None else serve.canary.version
    wanted = {"serve.canary.version": canary, "serve.shadow": serve.shadow}
    found: list[PinnedModel | None] = []

    for key, version in wanted.items():
        if version == champion.version:
            raise UserError(
                f"{key}: version {version} is the champion: there is nothing to compare it with"
            )
        found.append(None if version is None else find_version(champion.name, version))
    return found[0], found[1]


def check_protection(settings: ServeConfig) -> None:
    """A broken file of keys is a UserError here, before anything is touched."""
    if settings.api_keys_file is not None:
        read_keys(Path(settings.api_keys_file))
    elif settings.host not in LOOPBACK:
        logger.warning(
            "serve.api_keys_file is not set: whoever reaches %s may %s",
            settings.host,
            "see what users did, rank and post events"
            if has_page(settings)
            else "rank and post events",
        )


def send_update(settings: ServeConfig, dashboard_url: str, wanted: dict[str, Any]) -> str:
    """Send the configuration with `wanted` as the replicas' `user_config`, and wait until nothing
    else answers.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    dashboard = dashboard_url if "://" in dashboard_url else f"http://{dashboard_url}"
    client = ServeSubmissionClient(dashboard)
    details = client.get_serve_details()
    port = _running_port(details)
    is_new = port is None
    if port is None:
        port = settings.port or free_port()
        require_free_port(settings.host, port)

    filled = serve_config(settings, wanted, port, code_of_this_job())
    _send(client, beside_others(filled, details))
    url = f"http://{settings.host}:{port}"
    wait_for_update(client, url, wanted["deployment"], settings.start_timeout_s)
    _tell_outage(url, settings.redis_url, is_new=is_new)
    return url


def _tell_outage(url: str, redis_url: str | None, *, is_new: bool) -> None:
    """Say that the event store does not answer.

    Raises:
        Outage: of a new server, whose address for it may be wrong.
    """
    info = _ready(url)
    if info is None or info["live_events"]:
        return
    where = "of the run" if redis_url is None else f"{redis_url} (serve.redis_url)"
    told = f"the server ranks without events: the event store {where} does not answer"
    if is_new:
        raise Outage(told)
    logger.warning(told)


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that somebody listens on, another server of ours above all.

    Serve's ingress shares its port with whoever of the same user asks for it: two servers on one
    port would answer each other's requests.

    Raises:
        UserError: the port was not free within 15 s.
    """

    def is_free() -> bool:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                # an address of another machine: nothing to find out from here
                return error.errno != errno.EADDRINUSE
        return True

    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        wait_until(is_free, f"port {port} to be free", PORT_WAIT_S)
    except TimeoutError:
        raise UserError(
            f"serve.port: something else listens on {host}:{port}; choose another, or 0 for any "
            "free one"
        ) from None


def code_of_this_job() -> dict[str, Any]:
    """A runtime environment in which replicas import the same code: the package of a submitted job,
    or this folder.
    """
    import ray

    submitted = ray.get_runtime_context().runtime_env.get("working_dir")
    return {"working_dir": submitted or f"local://{Path(__file__).parent.parent}"}


def _running_port(details: dict[str, Any]) -> int | None:
    """A server that runs keeps its port whatever the configuration says."""
    return details["http_options"]["port"] if details.get("applications") else None


def beside_others(filled: dict[str, Any], details: dict[str, Any]) -> dict[str, Any]:
    """`filled` with the applications that run on the cluster already: what a PUT does not name,
    Serve ends.

    Raises:
        UserError: another application answers at the same route.
    """
    (ours,) = filled["applications"]
    applications = [ours]
    for name, running in details.get("applications", {}).items():
        # None: somebody's own code started it, and no PUT ends it
        config_of_it = running.get("deployed_app_config")
        if name == APPLICATION:
            _tell_replaced_run(ours, config_of_it)
            continue

        if running.get("route_prefix") == ours["route_prefix"]:
            raise UserError(
                f"the application {name!r} of this cluster answers at {ours['route_prefix']} "
                "already: give it another route_prefix, or this server a cluster of its own"
            )
        if config_of_it is not None:
            applications.append(config_of_it)
    return filled | {"applications": applications}


def _tell_replaced_run(ours: dict[str, Any], running: dict[str, Any] | None) -> None:
    """Warn where the server of another run is about to be replaced."""
    folders = []
    for application in (ours, running or {}):
        for entry in application.get("deployments", []):
            if entry.get("user_config"):
                folders.append(entry["user_config"]["serving"])
    if len(set(folders)) > 1:
        logger.warning("the server of %s is replaced by that of %s", folders[1], folders[0])


def _send(client: Any, filled: dict[str, Any]) -> None:
    """PUT, once more where the dashboard could not: Serve replaces a proxy that a busy machine
    starts too slowly.
    """
    for left in reversed(range(SEND_TRIES)):
        try:
            client.deploy_applications(filled)
            return
        except RuntimeError as error:  # the client's one error for every HTTP status
            reason = str(error).strip()
            if not left:
                raise Outage(f"the dashboard did not take the configuration: {reason}") from None
            logger.warning(
                "the dashboard did not take the configuration, once more: %s",
                reason.splitlines()[-1],
            )
            time.sleep(SEND_PAUSE_S)


def refuse_overtaken(details: dict[str, Any], deployment: str, url: str) -> None:
    """Raises Outage where Serve wants another update than `deployment` by now: no replica will
    answer with this one, however long it is waited for.

    Serve's details name an update from the moment that its PUT returns.
    """
    wanted = find_wanted(details)
    if wanted not in (None, deployment):
        raise Outage(
            f"another job has updated the server at {url} meanwhile (deployment {wanted}): "
            "what that one sent answers, not the version of this job"
        )


def wait_for_update(client: Any, url: str, deployment: str, limit_s: float) -> None:
    """Return when nothing but the update of the id `deployment` answers at `url`.

    Raises:
        UserError: the new version failed to load.
        Outage: Serve gave up, somebody sent a later update, or other answers came for `limit_s`
            seconds.
    """
    in_a_row = 0
    next_look = time.monotonic() + LOOK_EVERY_S

    def swapped() -> bool:
        nonlocal in_a_row, next_look
        if time.monotonic() > next_look:
            refuse_overtaken(client.get_serve_details(), deployment, url)
            next_look = time.monotonic() + LOOK_EVERY_S

        info = _ready(url)
        if info is None:
            in_a_row = 0
            _require_no_failure(client)
            return False

        if info["failed_deployment"] == deployment:
            raise UserError(f"{_failure(url)}; version {info['model_version']} goes on answering")
        in_a_row = in_a_row + 1 if info["deployments"] == [deployment] else 0
        return in_a_row == ANSWERS

    try:
        wait_until(swapped, f"the new version to answer at {url}", limit_s, pause_s=POLL_S)
    except TimeoutError:
        raise Outage(
            f"{url} does not answer with the new version after {limit_s:.0f} s "
            f"(serve.start_timeout_s): {_status(client)}"
        ) from None


def find_wanted(details: dict[str, Any]) -> str | None:
    """Id of the newest update that Serve has taken, by its details; None where it has none of
    ours.
    """
    ours = details.get("applications", {}).get(APPLICATION, {})
    for entry in (ours.get("deployed_app_config") or {}).get("deployments", []):
        if entry.get("user_config"):
            return entry["user_config"]["deployment"]
    return None


def _require_no_failure(client: Any) -> None:
    """Raises Outage where Serve has given up."""
    status = _status(client)
    if status.startswith(("DEPLOY_FAILED", "UNHEALTHY")):
        raise Outage(f"the server did not start: {status}")


def _ready(url: str) -> dict[str, Any] | None:
    """Which updates answer: open to everybody, so that this job needs no API key."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, verify=certificates())
    except httpx.TransportError:  # not listening yet
        return None
    return answer.json() if answer.status_code == 200 else None


def _failure(url: str) -> str:
    """Why the new version did not load; that is shown only to who has a key, so it may stay in the
    replica's log.
    """
    answer = httpx.get(f"{url}/v1/model", timeout=5)
    reason = answer.json()["failure"] if answer.status_code == 200 else None
    return reason or "the new version did not load (the reason is in the replica's log)"


def _status(client: Any) -> str:
    application = client.get_serve_details()["applications"].get(APPLICATION, {})
    said = [application.get("status", "no application"), application.get("message", "")]
    for entry in application.get("deployments", {}).values():
        if entry["message"]:
            said.append(entry["message"])
    return ": ".join(said)


def plan_serving(folders: RunFolders, settings: ServeConfig) -> dict[str, object]:
    """What would be served, for `--dry-run`."""
    manifest = store.read_manifest(folders.sequence_dir)
    check_protection(settings)
    check_columns(folders.sequence_dir, settings)
    return {
        "sequences": {
            "folder": str(folders.sequence_dir),
            "users": manifest.num_users,
            "rows": manifest.num_rows,
        },
        "listen": f"{settings.host}:{settings.port or 'any free port'}",
        "processes": _describe_processes(settings),
        "page": has_page(settings),
        "canary": None if settings.canary is None else config.to_dict(settings.canary),
        "shadow": settings.shadow,
        "events": settings.redis_url or str(folders.run_dir / "serving" / "events.sqlite"),
        "api_keys": settings.api_keys_file or "none: open to whoever reaches it",
    }


def _describe_processes(settings: ServeConfig) -> str:
    if settings.one_process:
        return "1 that ranks, with the ingress in it"

    def count(least: int, most: int | None) -> str:
        return str(least) if most is None else f"{least} to {most}"

    ingresses = count(settings.num_ingress, settings.max_ingress)
    rankers = count(settings.num_replicas, settings.max_replicas)
    return f"{ingresses} of the ingress, {rankers} that rank"
