"""One configuration: every mistake is one message naming key and value, every preset loads, no key
is dead.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.config import AttentionConfig, ConfigError
from pipeline.config.reading import apply_overrides
from pipeline.search.space import with_settings
from tests.support.reference.configuration import find_sections

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "pipeline" / "config"
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
DEMO = ROOT / "configs" / "demo.yaml"

MISTAKES = [
    ("train.epoch=1", "train.epoch", "1"),  # unknown key
    ("modle.d_model=8", "modle", "8"),  # unknown section
    ("source.synthetic.users=5", "source.synthetic.users", "5"),
    ("train.epochs=two", "train.epochs", "'two'"),  # wrong type
    ("train.epochs=1.5", "train.epochs", "1.5"),
    ("train=", "train is empty", "leave it out"),
    ("features.item.tag={dim: -8}", "features.item.tag.dim", "-8"),
    ("model.attention.window=none", "model.attention.window", "or null, got 'none'"),
    ("source.kind=csv", "source.kind", "source.format"),
    ("tasks=[is_click, is_click]", "tasks", "free of repeats"),
    ("train.epochs=true", "train.epochs", "true"),
    ("train.use_gpu=1", "train.use_gpu", "1"),
    ("train.lr=fast", "train.lr", "'fast'"),
    ("tasks=is_click", "tasks", "'is_click'"),
    ("source.columns=[a]", "source.columns", "['a']"),
    ("features.item.tag=8", "features.item.tag", "8"),
    ("train.epochs=0", "train.epochs", "0"),  # out of range
    ("train.lr=-1", "train.lr", "-1"),
    ("model.dropout=1", "model.dropout", "1"),
    ("model.attention.window=-3", "model.attention.window", "-3"),
    ("model.truncate_after_layer=2", "model.truncate_after_layer", "2"),
    ("model.num_layers=0", "model.num_layers", "0"),
    ("model.candidate_action=zero", "model.candidate_action", "'zero'"),
    ("model.channels={a: {actions: [is_clicked]}}", "model.channels.a.actions", "'is_clicked'"),
    ("model.channels={a: {max_len: 0}}", "model.channels.a.max_len", "0"),
    ("model.channels={a: {truncate_after_layer: 2}}", "model.channels.a.truncate_after_layer", "2"),
    ("model.channels={a: {depth: 2}}", "model.channels.a.depth", "2"),
    # full rows would count later labels
    ("model.channels={a: {actions: [is_like]}}", "train.layout", "'user'"),
    ("model.time_anchor=query", "train.layout", "'user'"),
    ("features.watch_seconds=[0]", "features.watch_seconds", "0"),
    ("features.watch_shares=[0.5]", "features.duration_ms_column", "null"),
    (
        "features.duration_ms_column=video_duration",
        "features.duration_ms_column",
        "'video_duration'",
    ),
    (f"features.watch_seconds={list(range(1, 25))}", "features.watch_seconds", "32"),
    ("model.attention_backend=cuda", "model.attention_backend", "'cuda'"),
    ("model.token_backend=cuda", "model.token_backend", "'cuda'"),
    ("model.recompute=[y, z]", "model.recompute[1]", "'z'"),
    ("train.precision=fp8", "train.precision", "'fp8'"),
    ("train.stochastic_length.alpha=1", "train.stochastic_length.alpha", "1"),
    ("checks.max_quarantined_share=1.1", "checks.max_quarantined_share", "1.1"),
    ("checks.max_null_share.watch_ms=-1", "checks.max_null_share.watch_ms", "-1"),
    ("checks.max_null_share.watched=0.1", "checks.max_null_share", "'watched'"),
    ("checks.max_unknown_share.tab=0.1", "checks.max_unknown_share", "'tab'"),
    ("checks.action_rate.is_click=[0.5, 0.1]", "checks.action_rate.is_click", "[0.5, 0.1]"),
    ("checks.action_rate.is_click=0.1", "checks.action_rate.is_click", "0.1"),
    ("drift.lengths=2", "drift.lengths", "2"),
    ("split.t_val=yesterday", "split.t_val", "'yesterday'"),
    # without its offset from UTC
    ("split.t_val=2022-05-01T00:00:00", "split.t_val", "2022-05-01T00:00:00"),
    ("split.t_test=2022-04-01T00:00:00+08:00", "split.t_test", "2022-04-01"),  # before t_val
    ("split.t_val=2022-13-01T00:00:00Z", "split.t_val", "'2022-13-01T00:00:00Z'"),  # no such month
    ("train.epochs=0x_", "train.epochs", "'0x_'"),  # looks like a number
    ("train.lr=.inf", "train.lr", "inf"),
    ("tracking.gate_max_ne.is_click=.nan", "tracking.gate_max_ne.is_click", "nan"),
    ("tracking.uri=mlflow:5000", "tracking.uri", "'mlflow:5000'"),
    ("seed=-1", "seed must be", "-1"),
    ("seed=4294967296", "seed must be", "4294967296"),
    ("evaluate.cutoffs=[]", "evaluate.cutoffs", "[]"),
    ("evaluate.cutoffs=[10, 10]", "evaluate.cutoffs", "[10, 10]"),
    ("ray.num_cpus=0", "ray.num_cpus", "0"),
    ("ray.object_store_mb=10", "ray.object_store_mb", "10"),
    ("serve.parity_requests=0", "serve.parity_requests", "0"),
    ("name=champions", "name", "'champions'"),
    ("name=' '", "name", "' '"),
    ("runs_dir=''", "runs_dir", "''"),
    ("source.path=''", "source.path", "''"),
    ("source.items={path: x, id_column: ''}", "source.items.id_column", "''"),
    ("tracking.experiment=''", "tracking.experiment", "''"),
    ("sequences.latest_time=2000-01-01T00:00:00Z", "sequences.latest_time", "2000-01-01"),
    ("features.hour_utc_offset=30", "features.hour_utc_offset", "30"),
    ("features.item.tag={kind: quantile, most_values: 3}", "features.item.tag.most_values", "3"),
    ("model.norm_eps=0", "model.norm_eps", "0"),
    ("serve.host=", "serve.host", "null"),
    ("serve.host=''", "serve.host", "''"),
    ("tasks=[is_clicked]", "tasks", "'is_clicked'"),  # not an action
    ("tracking.gate_max_ne.is_hate=1", "tracking.gate_max_ne", "'is_hate'"),  # not a task
    ("features.request.hours={}", "features.request", "'hours'"),
    ("features.user_tokens.activity=[fans]", "features.user_tokens", "'fans'"),
    ("source.path=null", "source.path", "null"),
    ("source.actions=[is_click, is_click]", "source.actions", "is_click"),
    ("serve.port=70000", "serve.port", "70000"),
    ("serve.cuda_graphs=true", "serve.cuda_graphs", "true"),
    ("name=a/b", "name", "'a/b'"),
    ('name="a\\nb"', "name", r"'a\nb'"),
    (f"name={'a' * 201}", "name", "200 bytes"),
    ('runs_dir="a\\0b"', "runs_dir", r"'a\x00b'"),
    ('serve.host="\\uD800"', "serve.host", r"'\ud800'"),
    # what is long is shown in part
    (f"seed={'x' * 100_000}", "seed", "xxx"),
    (f"seed=0x{'f' * 5000}", "seed", "an integer of 20000 bits"),
    (f"seed={'[' * 90}{']' * 90}", "seed", "[[[[[...]]]]]"),
    (f"name={'[' * 5000}", "--set name", "[[["),
    # parts of a time that strptime does not have, or has twice
    ("source.columns={event_time: {column: at, format: '%Q'}}", "event_time.format", "'%Q'"),
    ("source.columns={event_time: {column: at, format: '%H %H'}}", "event_time.format", "'%H %H'"),
    # a key without a default
    ("source.users={id_column: uid}", "source.users.path", "['id_column']"),
    ("serve.canary={}", "serve.canary.version", "[]"),
    ("train.epochs", "--set", "'train.epochs'"),  # no value
    ("=3", "--set", "'=3'"),
    ("seed.x=3", "--set seed.x", "seed"),  # not a section
    ("train.epochs=[1", "--set train.epochs", "'[1'"),  # not YAML
]


@pytest.mark.parametrize(("override", "key", "value"), MISTAKES, ids=[m[0][:60] for m in MISTAKES])
def test_a_mistake_names_its_key_and_value(override, key, value):
    with pytest.raises(ConfigError) as caught:
        config.load(DEMO, [override])
    message = str(caught.value)
    assert key in message
    assert value in message
    assert "\n" not in message
    assert len(message) < 2000


def nested_aliases() -> str:
    """YAML of a few hundred bytes that names lists in lists: nine to the power of ten texts."""
    inner = "&a0 [x, x, x, x, x, x, x, x, x]"
    for depth in range(1, 10):
        inner = f"&a{depth} [{inner}{f', *a{depth - 1}' * 8}]"
    return inner


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: [", "is not YAML: line 1: "),
        (
            "train:\n\tlr: 1",
            "line 2: found character '\\t' that cannot start any token: YAML is indented",
        ),
        ("a: {b: 1}\nname: x\na: 2", "is not YAML: line 3: the key 'a' stands there a second time"),
        ("\0", "is not YAML: "),
        ("[" * 5000, "is not YAML: it is nested too deeply"),
        (f"name: [{nested_aliases()}]", "name must be text, got [["),
        ("- 1", "must hold a mapping, got list"),
        ("", "is empty"),
        ("source: 3", "source must be a mapping, got 3"),
        ("3: 4", "unknown configuration key '3' (value 4)"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, complaint):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file or directory$"):
        config.load(tmp_path / "nowhere.yaml")
    with pytest.raises(
        ConfigError, match=r"No such file or directory; is it .*configs/demo\.yaml\?"
    ):
        config.load(DEMO.parent / "demos.yaml")


def test_set_replaces_one_value_and_creates_sections():
    cfg = config.load(
        DEMO,
        [
            "train.epochs=7",
            "train.lr=2e-3",
            "model.attention.window=null",
            "evaluate.batch_tokens=9",
        ],
    )
    assert (
        cfg.train.epochs,
        cfg.train.lr,
        cfg.model.attention.window,
        cfg.evaluate.batch_tokens,
    ) == (7, 2e-3, None, 9)
    assert cfg.train.batch_users == config.load(DEMO).train.batch_users


def test_on_and_off_need_no_quotes():
    """YAML reads them as true and false."""
    for written, meant in (("off", "off"), ("on", "on"), ("'off'", "off"), ("auto", "auto")):
        cfg = config.load(DEMO, [f"train.cuda_graphs={written}", f"serve.page={written}"])
        assert (cfg.train.cuda_graphs, cfg.serve.page) == (meant, meant)
    with pytest.raises(ConfigError, match="precision"):
        config.load(DEMO, ["train.precision=off"])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_presets_survive_a_round_trip(preset, tmp_path):
    cfg = config.load(preset)
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(config.to_dict(cfg)))
    assert config.load(saved) == cfg
    flat = config.flatten(config.to_dict(cfg))
    assert flat["train.epochs"] == cfg.train.epochs
    assert not any(isinstance(value, dict) and value for value in flat.values())


# Settings that the library reads through a property of their section alone.
READ_BY_PROPERTY = {"split.t_end": "SplitConfig.end_ms"}


def attributes_read(folder: Path, besides: Path) -> set[str]:
    """Names that the code below `folder` reads as attributes, outside of the folder `besides`."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        if path.is_relative_to(besides):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return found


def test_every_setting_is_read_outside_of_the_configuration():
    read: set[str] = set()
    for folder in ("pipeline", "kernels", "jobs", "serve_app"):
        read |= attributes_read(ROOT / folder, besides=CONFIG)

    entries = [entry for section in find_sections() for entry in section.entries]
    unread = {entry.key for entry in entries if entry.field.name not in read}
    assert unread == READ_BY_PROPERTY.keys()
    assert "end_ms" in read


JOB = "from jobs import cli; cli.run('A job.', lambda job: print('ran', job.cfg.name))"


def run_job(*arguments: str, code: str = JOB) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_ctrl_c_ends_a_job_in_one_line():
    job = "from jobs import cli\ndef main(job): raise KeyboardInterrupt\ncli.run('A job.', main)"
    command = [sys.executable, "-c", job, "--config", "configs/demo.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_python_ignores_ends_a_job_all_the_same(sent: str, code: int) -> None:
    """One that comes while an object ends: Python ignores what is raised there."""
    job = f"""
import signal, time
from jobs import cli

class Ending:
    def __del__(self):
        signal.raise_signal(signal.{sent})

def main(job):
    # a shell starts what runs in its background without
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Ending()
    print("goes on", flush=True)
    time.sleep(600)

cli.run("A job.", main)
"""
    done = run_job("--config", str(DEMO), code=job)
    assert done.returncode == code, done.stderr
    assert done.stdout == "goes on\n"


def test_a_job_runs_its_main():
    done = run_job("--config", "configs/demo.yaml", "--set", "name=other")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran other\n", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--config", "configs/demo.yaml", "--set", "train.epoch=1"],
            "unknown configuration key 'train.epoch' (value 1); is it train.epochs?",
        ),
        (
            ["--config", "configs/demo.yaml", "--set", "window=8"],
            "unknown configuration key 'window' (value 8); the top level has ['name', 'seed'",
        ),
        (
            ["--config", "configs/demo.yaml", "--set", "d_model=8"],
            "unknown configuration key 'd_model' (value 8); is it model.d_model?",
        ),
        (
            ["--config", "configs/demo.yaml", "--set", "split.t_val=2022-04-30"],
            "split.t_val must carry its offset from UTC (2022-05-01T00:00:00+08:00), got "
            "'2022-04-30'",
        ),
        (
            ["--config", "configs/demo.yaml", "--set", "train.epochs=two"],
            "train.epochs must be a whole number, got 'two'",
        ),
        (
            ["--config", "configs/demos.yaml"],
            "--config configs/demos.yaml: No such file or directory",
        ),
    ],
)
def test_a_job_answers_a_mistake_with_one_message_and_exit_code_2(arguments, complaint):
    done = run_job(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {complaint}")
    assert done.stderr.count("\n") == 1


def test_an_unknown_option_exits_with_2():
    done = run_job("--config", "configs/demo.yaml", "--epochs", "3")
    assert done.returncode == 2
    assert "unrecognized arguments: --epochs 3" in done.stderr


def test_a_dry_run_prints_the_resolved_configuration_and_starts_nothing():
    done = run_job("--config", "configs/demo.yaml", "--set", "train.epochs=9", "--dry-run")
    assert done.returncode == 0
    assert "ran demo" not in done.stdout
    resolved = yaml.safe_load(done.stdout)
    resolved.pop("plan")
    assert config.from_dict(resolved) == config.load(DEMO, ["train.epochs=9"])


BESIDE_CHANNELS = {
    "model.num_layers": 3,
    "model.attention.window": 4,
    "model.attention.scaling_seq_len": 64,
    "model.truncate_after_layer": None,
    "model.truncate_to": 64,
}


@pytest.mark.parametrize("key", BESIDE_CHANNELS)
def test_a_setting_that_channels_do_not_read_is_refused(tmp_path: Path, key: str) -> None:
    """Set in the same place as the channels, in a later one, or by a search."""
    value = BESIDE_CHANNELS[key]
    channels = "model.channels={all: {attention: {window: null}}}"
    own = key.removeprefix("model.")
    text = "null" if value is None else str(value)
    message = rf"{key} must be left out beside model\.channels.* of all, got {text}$"
    message = message.replace("of all", rf"model\.channels\.NAME\.{own} of all")

    with pytest.raises(ConfigError, match=message):
        config.load(DEMO, [channels, f"{key}={text}"])

    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump(config.to_dict(config.load(DEMO, [channels]))))
    mixture = config.load(preset)
    with pytest.raises(ConfigError, match=message):
        config.load(preset, [f"{key}={text}"])
    with pytest.raises(ConfigError, match=message):
        with_settings(mixture, {key: value})

    raw = config.to_dict(mixture)
    apply_overrides(raw, [f"{key}={text}"])
    preset.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=message):
        config.load(preset)
    assert not config.load(preset, ["model.channels={}"]).model.channels


def test_channels_take_the_place_of_the_one_transducer() -> None:
    cfg = config.load(DEMO, ["model.channels={all: {attention: {window: null}}}"])
    assert cfg.model.attention == AttentionConfig()
    assert config.from_dict(config.to_dict(cfg)) == cfg
    assert not {"num_layers", "attention", "truncate_to"} & config.to_dict(cfg)["model"].keys()
    assert with_settings(config.load(DEMO), {"model.channels": {"all": {}}}).model.channels


@pytest.mark.parametrize("value", [",", "%d.%m.%Y %H:%M", "|", "@", ";", "::"])
def test_signs_that_a_shell_has_unquoted_are_text(value: str):
    key = "source.columns.event_time.format"
    raw = apply_overrides({}, [f"{key}={value}"])
    assert raw["source"]["columns"]["event_time"]["format"] == value
