"""The token encoder's row kernels in Triton's interpreter, in float32: position and time, LayerNorm
and its gate.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.frozen_tokens.triton_launch import FrozenSwish, SwishTile, launch_linear_swish
from kernels.layer_norm.op import layer_norm, swish_layer_norm
from kernels.linear import triton_launch as linear
from kernels.linear.weights import frozen_form
from kernels.position_time import triton_launch
from kernels.position_time.op import add_position_time
from kernels.position_time.types import Anchor
from pipeline.model.tokens import ActionEncoder, TokenEncoder
from tests.support.accuracy import assert_as_accurate
from tests.worlds.model import make_batch, make_config, make_model

MINUTE = 60_000


@pytest.fixture(autouse=True)
def poisoned():
    # new tensors start as NaN, so that what is not written shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


NORMS = {"plain": layer_norm, "gate": swish_layer_norm}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 16), (37, 24), (5, 1100)])
def test_interpreted_norms(kind: str, rows: int, width: int) -> None:
    torch.manual_seed(0)
    given = [torch.randn(rows, width) * 2 + 0.3, torch.randn(width) + 1, torch.randn(width)]
    grad = torch.randn(rows, width)

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in given]
        out = NORMS[kind](*leaves, eps=1e-3, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth, plain = run(torch.float64, "torch"), run(torch.float32, "torch")
    fast = run(torch.float32, "triton")
    assert_as_accurate(fast, plain, truth, num_terms=max(rows, width))


def test_norms_read_rows_that_lie_apart_and_keep_their_type() -> None:
    wide = torch.randn(9, 40, dtype=torch.bfloat16)
    weight, bias = torch.randn(24), torch.randn(24)
    with torch.autocast("cpu", torch.bfloat16):
        for norm in NORMS.values():
            fast, plain = (
                norm(wide[:, 3:27], weight, bias, backend=backend)
                for backend in ("triton", "torch")
            )
            assert fast.dtype == plain.dtype == torch.bfloat16
            torch.testing.assert_close(fast, plain, rtol=0.02, atol=0.02)


def test_a_norm_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 4\), \(5,\) and \(4,\)"):
        layer_norm(torch.ones(3, 4), torch.ones(5), torch.ones(4))
    with pytest.raises(
        ValueError, match=r"takes float16, bfloat16 and float32, got torch\.float64"
    ):
        swish_layer_norm(torch.ones(3, 4).double(), torch.ones(4), torch.ones(4), backend="triton")


PLACES = {  # positions and gaps of the tokens: rows touched once, often, by all, by none
    "spread": (
        torch.arange(60) * 7,
        torch.randint(0, 2**40, (60,), generator=torch.Generator().manual_seed(0)),
    ),
    "first tokens": (torch.arange(25).repeat(2), torch.arange(-1, 49) * 1000),
    "one row": (torch.full((80,), 11), torch.full((80,), -1)),
    "last rows": (torch.full((40,), 12), torch.full((40,), 2**50)),
    "few": (torch.tensor([3, 3, 20]), torch.tensor([0, -1, 5])),
    "none": (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
}


@pytest.mark.parametrize(
    ("anchor", "width", "third"), [("event", 16, False), ("query", 21, False), ("event", 16, True)]
)
@pytest.mark.parametrize("name", PLACES)
def test_interpreted_position_and_time(
    monkeypatch: pytest.MonkeyPatch, name: str, anchor: Anchor, width: int, third: bool
) -> None:
    """Outputs and the gradients of both tables, 13 and 9 rows, and of a third of 5; runs over
    several chunks and blocks of columns.
    """
    monkeypatch.setattr(triton_launch, "SUMMED", {4: (16, 16)})
    monkeypatch.setattr(triton_launch, "PARTIAL", 2)
    position, gap = PLACES[name]
    torch.manual_seed(0)
    sizes = (len(gap), 13, 9, 5) if third else (len(gap), 13, 9)
    given, grad = [torch.randn(rows, width) for rows in sizes], torch.randn(len(gap), width)
    number = (torch.arange(len(gap)) ** 2) % 4  # of four rows, one of which no token has

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in given]
        options = {"anchor": anchor, "backend": backend}
        if third:
            options["third"] = leaves[3], number
        out = add_position_time(*leaves[:3], position, gap, **options)
        with torch.no_grad():
            assert torch.equal(add_position_time(*leaves[:3], position, gap, **options), out)
        out.backward(grad.to(dtype))
        return [out.detach(), *(leaf.grad.to_dense() for leaf in leaves)]

    truth, plain = run(torch.float64, "reference"), run(torch.float32, "torch")
    fast, again = run(torch.float32, "triton"), run(torch.float32, "triton")
    assert_as_accurate(fast, plain, truth, num_terms=max(1, len(gap)))
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))


def test_a_table_gradient_is_compact_and_names_rows_with_tokens_alone() -> None:
    """What row-wise AdamW updates: rows without tokens must not be among them."""
    position, gap = torch.tensor([2, 5, 2, 9] * 20), torch.tensor([-1, 0, 10**9, -1] * 20)
    tables = [torch.zeros(n, 4, requires_grad=True) for n in (12, 6)]
    out = add_position_time(torch.zeros(80, 4), *tables, position, gap, backend="triton")
    out.sum().backward()
    touched = [{2, 5, 9}, {0, 1, 5}]  # gaps of none, 0 ms and 12 days
    for table, rows in zip(tables, touched, strict=True):
        assert table.grad.is_sparse and table.grad._values().shape == table.shape
        assert set(table.grad._indices()[0].tolist()) == rows


def test_a_training_warns_of_no_checks_that_it_has_turned_off() -> None:
    """PyTorch 2.11's own words."""
    program = (
        "import warnings, kernels.position_time.triton_launch\n"
        "warnings.warn('Sparse invariant checks are implicitly disabled. Memory errors')\n"
        "warnings.warn('Sparse tensors are new')"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "invariant" not in done.stderr
    assert "Sparse tensors are new" in done.stderr, "others are told"


def test_only_one_table_may_learn() -> None:
    tables = [torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)]
    place = torch.tensor([0, 1, 5, 2, 2]), torch.tensor([-1, 4, -1, 3, 3])
    for backend in ("triton", "torch"):
        x = torch.ones(5, 4, requires_grad=True)
        add_position_time(x, *tables, *place, backend=backend).sum().backward()
        assert torch.equal(x.grad, torch.ones(5, 4))
        assert tables[1].grad.to_dense().tolist() == [[2.0] * 4, [3.0] * 4]
        tables[1].grad = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_BE": torch.ones(1, 2)}, r"got \(4, 2\), \(3, 2\) and \(1, 2\)"),
        ({"position_PE": torch.ones(3, 5)}, r"got \(4, 2\), \(3, 5\) and \(5, 2\)"),
        (
            {"gap_ms_T": torch.zeros(3).long()},
            r"must be \[4\], one per token, got \(4,\) and \(3,\)",
        ),
        ({"anchor": "now"}, "anchor must be one of event, query, got 'now'"),
        (
            {"third": (torch.ones(3, 2), torch.zeros(3).long())},
            r"third must be \[N, 2\] and \[4\], got \(3, 2\) and \(3,\)",
        ),
        ({"x_TE": torch.ones(4, 2).double(), "backend": "triton"}, "got torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    fitting = {
        "x_TE": torch.ones(4, 2),
        "position_PE": torch.ones(3, 2),
        "time_BE": torch.ones(5, 2),
    }
    fitting |= {"position_T": torch.zeros(4).long(), "gap_ms_T": torch.zeros(4).long()}
    add_position_time(**fitting)
    with pytest.raises(ValueError, match=message):
        add_position_time(**{**fitting, **change})


@pytest.mark.parametrize(
    ("settings", "history"),
    [
        ({"candidate_action": "learned"}, [20, 0, 5]),
        ({"merge": False}, [20, 0, 5]),
        # more tokens than rows of all tables: the action MLP runs over each state once
        ({"candidate_action": "learned"}, [50, 0, 20]),
        ({}, [50, 0, 20]),
        ({"heterogeneous_actions": False}, [20, 0, 5]),
    ],
)
def test_a_model_learns_as_with_plain_pytorch(settings: dict, history: list[int]) -> None:
    batch, found = make_batch(history, [3, 2, 1]), {}
    for backend in ("triton", "torch"):
        cfg = make_config(token_backend=backend, position_buckets=8, time_buckets=4, **settings)
        model = make_model(cfg).float()
        logits = model(batch)
        logits.square().sum().backward()
        found[backend] = (
            logits,
            {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None},
        )
    (logits, grads), (expected, expected_grads) = found["triton"], found["torch"]
    torch.testing.assert_close(logits, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        expected = expected_grads[name]
        assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6, name


def test_a_frozen_model_makes_the_rows_of_its_actions_states_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And anew when its weights have changed."""
    batch, cfg = make_batch([5, 0], [2, 1]), make_config(candidate_action="learned")
    plain = make_model(cfg).float().requires_grad_(False)
    model = make_model(replace(cfg, model=replace(cfg.model, token_backend="triton"))).float()
    model.requires_grad_(False)
    made: list[int] = []
    state_rows = ActionEncoder.state_rows

    def count_tables(encoder: ActionEncoder) -> Tensor:
        made.append(encoder.num_states)
        return state_rows(encoder)

    monkeypatch.setattr(ActionEncoder, "state_rows", count_tables)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(batch), plain(batch))
        assert made == [27]
        for changed in (model, plain):
            changed.encoder.action.set_rows.mul_(-1)
        torch.testing.assert_close(model(batch), plain(batch))
    assert made == [27, 27]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 16), (1, 24, 40), (37, 40, 72)])
def test_interpreted_linear_map_with_its_gate(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    rows: int,
    inputs: int,
    outputs: int,
) -> None:
    """By pointers, and by descriptors as on Hopper; rows with a mean, of several blocks."""
    monkeypatch.setattr(linear, "_capability", lambda _: capability)
    torch.manual_seed(0)
    given = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs) + 3]
    norm = [torch.randn(outputs) + 1, torch.randn(outputs)]

    def run(dtype: torch.dtype) -> Tensor:
        x, w, bias = (t.to(dtype) for t in given)
        weight, shift = (t.to(dtype) for t in norm)
        h = torch.nn.functional.linear(x, w, bias)
        return swish_layer_norm(h, weight, shift, eps=1e-3, backend="torch")

    frozen = FrozenSwish.of(*given[1:], torch.float32)
    fast = launch_linear_swish(given[0], frozen, *norm, 1e-3, SwishTile(16, 32, 4, 1))
    truth, plain = run(torch.float64), run(torch.float32)
    assert_as_accurate([fast], [plain], [truth], num_terms=max(inputs, outputs))


@pytest.mark.parametrize("outputs", [256, 24])
def test_a_smaller_map_has_mean_and_variance_of_rows_of_nearly_dependent_weights(
    outputs: int,
) -> None:
    """As if it were kept in more than half precision."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, 8) @ torch.randn(8, 40) + 1e-3 * torch.randn(outputs, 40)
    frozen = FrozenSwish.of(weight, torch.randn(outputs) + 3, torch.bfloat16)
    x = torch.randn(100, 40, dtype=torch.bfloat16).double()
    h = x @ frozen.weight.double().T + frozen.bias

    high, low = frozen.factors.double().chunk(2)
    made = x @ (high + low).T + frozen.shifts
    variance = made[:, 1:].square().sum(1) / outputs
    torch.testing.assert_close(made[:, 0], h.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, h.var(1, correction=0), rtol=1e-4, atol=0)


def test_a_form_of_a_frozen_weight_is_made_anew_where_what_it_is_made_of_changed() -> None:
    weight, bias = torch.zeros(3, 2), torch.zeros(3)
    made = lambda: frozen_form(weight, "sum", lambda: (weight.sum() + bias.sum()).item(), (bias,))
    assert made() == 0
    for changed in (weight, bias):
        before = made()
        changed[0] = 1
        assert made() > before


PLACED_MODELS: dict[str, dict] = {
    "plain": {},
    "learned action": {"candidate_action": "learned"},
    "one action": {"heterogeneous_actions": False},
    "ages": {},
}


@pytest.mark.parametrize("name", PLACED_MODELS)
def test_tokens_without_gradients_are_placed_in_one_pass(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They are those of plain PyTorch, with their context and without, of empty sequences too."""
    placed: list[int] = []
    placed_rows = TokenEncoder._placed_rows

    def count_rows(encoder: TokenEncoder, *arguments) -> Tensor:
        found = placed_rows(encoder, *arguments)
        placed.append(len(found))
        return found

    monkeypatch.setattr(TokenEncoder, "_placed_rows", count_rows)
    batch = make_batch([5, 0, 0, 20], [2, 1, 0, 3])
    found = {}
    for backend in ("triton", "torch"):
        cfg = make_config(token_backend=backend, **PLACED_MODELS[name])
        if name == "ages":
            model = replace(cfg.model, time_anchor="query")
            cfg = replace(cfg, model=model, train=replace(cfg.train, layout="request"))
        encoder = make_model(cfg).float().requires_grad_(False).encoder
        with torch.no_grad():
            found[backend] = encoder(batch), encoder.event_rows(batch)
    (tokens, rows), (expected, expected_rows) = found["triton"], found["torch"]

    # two tokens of context in each of four sequences
    assert placed == [31 + 8, 31]
    torch.testing.assert_close(tokens.x_TE, expected.x_TE)
    torch.testing.assert_close(rows, expected_rows)
    assert torch.equal(tokens.seq_offsets, expected.seq_offsets)
    assert torch.equal(tokens.lengths_on_host(), expected.lengths_on_host())
