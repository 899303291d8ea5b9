"""Training steps through autograd as programs run them: captured in a CUDA graph and replayed on other numbers and
lengths, on two streams at once, without making the host wait."""

from __future__ import annotations

import random
from dataclasses import replace

import flashspark
import pytest
import test_backward
import torch
from problem import ON_CPU, captured
from test_backward import STATE, Case, Tensors, by_formula, compare, make
from test_graphs import no_waiting, synchronize

REPLAYS = 3 if ON_CPU else 8
TURNS = 20

STEPS = {
    "dense": Case([(300, 300)] * 2, (4, 2), options={"causal": True}),
    "equal parts": Case([(700, 900)], (4, 2)),  # of all tiles: CTAs count what they have added to dq
    "d64": Case([(200, 333)] * 2, (4, 4), (64, 64), torch.float16),
    "d256, window": Case([(130, 200)], (4, 2), (256, 256), options={"causal": True, "window_size": (60, 0)}),
    "varlen": Case([(10, 100), (150, 20), (77, 130)], (4, 2), varlen=True, options={"causal": True}),
    "varlen, sinks, lse": Case(
        [(10, 100), (150, 20), (1, 1)], (6, 2), (64, 64), varlen=True, sinks=True, dlse=True,
        options={"window_size": (50, 9)},
    ),
    "dropout": Case([(130, 200), (60, 77)], (4, 2), varlen=True, p=0.2, options={"causal": True}),
    "deterministic": Case([(300, 300)] * 2, (4, 2), options={"causal": True, "deterministic": True}),
    "softcap": Case([(200, 200)] * 2, (2, 2), spread=3, options={"softcap": 5.0, "causal": True}),
}  # fmt: skip


def in_order(t: Tensors) -> list[torch.Tensor | None]:
    return [t.q, t.k, t.v, t.dout, t.sinks, t.dlse]


class Step:
    """One training step on tensors that stay where they are. `set` gives them other numbers, offsets and seeds."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        given = make(case, 0, device)
        self.names = given.wanted()
        self.tensors = [None if x is None else x.clone() for x in in_order(given)]
        q, k, v, _, sinks, _ = self.tensors
        self.leaves = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
        self.offsets = [torch.zeros(len(case.lengths) + 1, dtype=torch.int32, device=device) for _ in range(2)]
        self.rng_state = torch.zeros(2, dtype=torch.int64, device=device)
        self.got: tuple[torch.Tensor, ...] = ()
        self.set(case, 0, STATE)

    def set(self, case: Case, seed: int, state: tuple[int, int]) -> None:
        with torch.no_grad():
            for x, new in zip(self.tensors, in_order(make(case, seed, self.device))):
                if x is not None:
                    x.copy_(new)
        for side, x in enumerate(self.offsets):
            x[1:] = torch.tensor([pair[side] for pair in case.lengths]).cumsum(0).to(x)
        self.rng_state.copy_(torch.tensor(state))

    def __call__(self) -> None:
        case, (q, k, v, dout, sinks, dlse) = self.case, self.tensors
        options = {**case.options, "return_softmax_lse": True, "learnable_sink": sinks}
        if case.p:
            options |= {"dropout_p": case.p, "rng_state": self.rng_state}
        if case.varlen:  # any sequence may be as long as all together
            out, lse = flashspark.flash_attn_varlen_func(q, k, v, *self.offsets, len(q), len(k), **options)
            lse = lse.t()
        else:
            rows = [x.unflatten(0, (len(case.lengths), -1)) for x in (q, k, v)]
            out, lse = flashspark.flash_attn_func(*rows, **options)
            out, lse = out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        results, given = [out], [dout]
        if dlse is not None:
            results, given = [out, lse], [dout, dlse]
        self.got = torch.autograd.grad(results, self.leaves, given)

    def check(self, case: Case, seed: int) -> None:
        tensors = make(case, seed, self.device)
        want, peer = (by_formula(case, dtype, tensors) for dtype in (torch.float64, case.dtype))
        compare(case, self.names, self.got, want, want, peer, seed)


def with_other_lengths(case: Case, seed: int) -> Case:
    """As many tokens and keys, cut elsewhere."""
    if not case.varlen:
        return case
    rng = random.Random(seed)
    sides = []
    for side in (0, 1):
        total = sum(pair[side] for pair in case.lengths)
        cuts = [0, *sorted(rng.sample(range(1, total), len(case.lengths) - 1)), total]
        sides.append([b - a for a, b in zip(cuts, cuts[1:])])
    return replace(case, lengths=list(zip(*sides)))


@pytest.mark.parametrize("name", STEPS)
def test_a_captured_step_replays_on_other_inputs(name, device, monkeypatch):
    step = Step(STEPS[name], device)
    step()
    replay = captured(step)
    for seed in range(1, REPLAYS + 1):
        case, state = with_other_lengths(STEPS[name], seed), (STATE[0] + seed, seed)
        step.set(case, seed, state)
        for x in step.got if not ON_CPU else ():
            x.fill_(torch.nan)
        replay()
        monkeypatch.setattr(test_backward, "STATE", state)
        step.check(case, seed)


@pytest.mark.needs_gpu
@pytest.mark.parametrize(
    "names",
    [
        ("dense", "varlen"),
        ("d64", "d256, window"),
        ("equal parts", "equal parts"),
        ("dropout", "varlen, sinks, lse"),
        ("deterministic", "softcap"),
    ],
)
def test_two_streams_at_once(names, device):
    steps = [Step(STEPS[name], device) for name in names]
    streams = [torch.cuda.Stream() for _ in steps]
    alone = []
    for step in steps:
        step()
        alone.append(step.got)
    synchronize()
    kept: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in steps]
    for _ in range(TURNS):
        for step, stream, results in zip(steps, streams, kept):
            with torch.cuda.stream(stream):
                step()
            results.append(step.got)
    synchronize()
    for step, first, results in zip(steps, alone, kept):
        for got in results:
            step.got = got
            step.check(step.case, 0)
            if step.case.options.get("deterministic"):
                assert all(map(torch.equal, got, first))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_make_the_host_wait(name, device):
    step = Step(STEPS[name], device)
    step()
    synchronize()
    with no_waiting():
        step()
    step.check(step.case, 0)


@pytest.mark.needs_gpu
def test_a_call_without_a_backward_pass_is_refused_at_once(device):
    """Heads of 512 columns have only a forward pass."""
    q, k, v = (torch.randn(1, 9, 2, 512, device=device, dtype=torch.bfloat16) for _ in range(3))
    out = flashspark.flash_attn_func(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        x.requires_grad_()
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=rf"(?s)^{name}\.requires_grad = True: .*head_dim 512 > 256"):
                flashspark.flash_attn_func(q, k, v)
        with torch.no_grad():
            assert torch.equal(flashspark.flash_attn_func(q, k, v), out)
        x.requires_grad_(False)
