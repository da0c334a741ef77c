"""Bank, gate and ledger against references that visit one sample at a time, in Python floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrote.method.bank import LossBank, fold_in_order_
from unrote.method.gate import LossGate, decide
from unrote.method.ledger import RUNNING_DECAY, Ledger


class SlowBank:
    """The memory bank as the paper's pseudo-code has it: one sample after another."""

    def __init__(self, num_timesteps, decay, bins, smooth, warm_start):
        self.num_timesteps, self.decay, self.smooth, self.warm_start = num_timesteps, decay, smooth, warm_start
        self.bins = bins or num_timesteps
        self.averages, self.visits = [0.0] * self.bins, [0] * self.bins

    def bin_of(self, timestep):
        return timestep * self.bins // self.num_timesteps

    def expected(self, timestep):
        here = self.bin_of(timestep)
        window = [b for b in range(here - self.smooth, here + self.smooth + 1) if 0 <= b < self.bins]
        total = sum(self.averages[b] for b in window)
        seen = sum(1 - self.decay ** self.visits[b] for b in window)
        if not (self.smooth or self.warm_start):
            return total
        return total / seen if seen else 0.0

    def update(self, timestep, loss):
        if math.isfinite(loss):
            here = self.bin_of(timestep)
            self.averages[here] = self.decay * self.averages[here] + (1 - self.decay) * loss
            self.visits[here] += 1


class SlowLedger:
    """Per-sample counts and ratios kept in dictionaries."""

    def __init__(self, num_samples):
        self.rows = [
            {"visits": 0, "skips": 0, "augmented": 0, "moves": 0, "since": 0, "ratios": []} for _ in range(num_samples)
        ]

    def record(self, index, ratio, skipped, augmented):
        row = self.rows[index]
        row["visits"] += 1
        row["skips"] += skipped
        row["since"] += skipped
        row["augmented"] += augmented
        if math.isfinite(ratio):
            row["ratios"].append(ratio)

    def running(self, index):
        ratios = self.rows[index]["ratios"]
        weights = [RUNNING_DECAY**age for age in reversed(range(len(ratios)))]
        return float(np.average(ratios, weights=weights)) if ratios else math.nan

    def columns(self):
        ratios = [row["ratios"] for row in self.rows]
        counts = {name: [row[name] for row in self.rows] for name in ("visits", "skips", "augmented", "moves")}
        return counts | {
            "last_ratio": [r[-1] if r else math.nan for r in ratios],
            "mean_ratio": [sum(r) / len(r) if r else math.nan for r in ratios],
            "running_ratio": [self.running(index) for index in range(len(self.rows))],
        }


TIMESTEPS, SAMPLES = 12, 5
sample = st.tuples(
    st.integers(0, TIMESTEPS - 1),
    st.integers(0, SAMPLES - 1),
    st.one_of(st.floats(0.0, 10.0, width=32), st.sampled_from([math.inf, math.nan, 0.0])),
    st.booleans(),
)
batches = st.lists(st.lists(sample, min_size=1, max_size=24), min_size=1, max_size=6)
settings_of_bank = st.fixed_dictionaries(
    {
        "decay": st.sampled_from([0.0, 0.5, 0.8, 0.99]),
        "bins": st.sampled_from([None, 1, 3, 5, TIMESTEPS]),
        "smooth": st.sampled_from([0, 1, 20]),
        "warm_start": st.booleans(),
    }
)


@settings(deadline=None, max_examples=150)
@given(batches=batches, options=settings_of_bank, skip_ratio=st.sampled_from([0.0, 0.5, 0.8, 2.0]))
def test_gate_bank_and_ledger_equal_a_loop_over_samples(batches, options, skip_ratio):
    bank, ledger = SlowBank(TIMESTEPS, **options), SlowLedger(SAMPLES)
    gate = LossGate(TIMESTEPS, skip_ratio, bank=LossBank(TIMESTEPS, **options), ledger=Ledger(SAMPLES))
    for batch in batches:
        t, index, loss, augmented = (torch.tensor(column) for column in zip(*batch, strict=True))
        leaf = loss.clone().requires_grad_()
        decision = gate.decide(leaf, t)
        expected = torch.tensor([bank.expected(int(step)) for step in t])
        torch.testing.assert_close(gate.bank.expected(t), expected, rtol=1e-5, atol=1e-6)

        # Where L is within rounding of λ b the two may differ; so what follows goes by the gate's own decision.
        threshold = skip_ratio * expected
        clear = (loss - threshold).abs() > 1e-5 * (1 + threshold) if skip_ratio else torch.ones_like(augmented)
        slow_keep = torch.tensor([not value < limit for value, limit in zip(loss, threshold, strict=True)])
        assert torch.equal(decision.keep[clear], slow_keep[clear])

        gate.record(decision, leaf, t, index, augmented)
        for row, (step, position, value, changed) in enumerate(batch):
            ledger.record(position, float(decision.ratio[row]), not decision.keep[row], changed)
            bank.update(step, value)
    torch.testing.assert_close(gate.bank.values, torch.tensor(bank.averages), rtol=1e-5, atol=1e-6)
    assert gate.bank.visits.tolist() == bank.visits
    for name, column in ledger.columns().items():
        np.testing.assert_allclose(gate.ledger.columns()[name], column, rtol=2e-5, atol=1e-38, err_msg=name)
    assert gate.ledger.skips_since_move.tolist() == [row["since"] for row in ledger.rows]
    for index in range(SAMPLES):
        found = gate.ledger.running_ratio_of(torch.tensor([index, index]))
        np.testing.assert_allclose(found, [ledger.running(index)] * 2, rtol=2e-5, atol=1e-38)


@settings(deadline=None, max_examples=100)
@given(
    visits=st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5, width=32)), max_size=60),
    start=st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4),
    decay=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
)
def test_fold_in_order_equals_the_recursion(visits, start, decay):
    averages, reference = torch.tensor(start), list(start)
    for slot, value in visits:
        reference[slot] = decay * reference[slot] + (1 - decay) * value
    slots = torch.tensor([slot for slot, _ in visits], dtype=torch.int64)
    fold_in_order_(averages, slots, torch.tensor([value for _, value in visits], dtype=torch.float32), decay)
    torch.testing.assert_close(averages, torch.tensor(reference, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_a_batch_is_judged_by_the_bank_before_it_and_order_within_it_matters():
    bank = LossBank(4, decay=0.5)
    bank.update(torch.tensor([2, 2]), torch.tensor([1.0, 3.0]))
    assert bank.values.tolist() == [0, 0, 0.5 * 0.5 + 0.5 * 3, 0]
    other = LossBank(4, decay=0.5)
    other.update(torch.tensor([2, 2]), torch.tensor([3.0, 1.0]))
    assert other.values[2] == 0.5 * 1.5 + 0.5 * 1
    gate = LossGate(4, 0.5)
    gate(torch.tensor([8.0, 1e-6], requires_grad=True), torch.tensor([1, 1]))
    assert gate.num_kept == 2, "both met an empty bank, whatever the first of them left in it"


@pytest.mark.parametrize("options", [{}, {"bins": 7}, {"warm_start": True}, {"smooth": 2}])
def test_first_visit_never_skips(options):
    gate = LossGate(100, 0.9, bank=LossBank(100, **options))
    t = torch.randint(100, (64,), generator=torch.Generator().manual_seed(0))
    assert gate.decide(torch.full((64,), 1e-9), t).keep.all()
    gate(torch.ones(64, requires_grad=True), t)
    assert not gate.decide(torch.full((64,), 1e-9), t).keep.any()


def test_smoothing_fills_a_bin_never_visited_from_its_neighbours():
    bank = LossBank(9, smooth=1)
    bank.update(torch.tensor([3, 5]), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(bank.expected(torch.tensor([4, 2, 8])), torch.tensor([3.0, 2.0, 0.0]))


def test_warm_start_removes_the_initial_zero():
    bank = LossBank(3, warm_start=True)
    bank.update(torch.tensor([1]), torch.tensor([7.0]))
    torch.testing.assert_close(bank.expected(torch.tensor([0, 1])), torch.tensor([0.0, 7.0]))


def test_gradient_is_that_of_the_mean_over_the_kept():
    gate = LossGate(10, 0.5)
    t = torch.tensor([4, 4, 4, 4])
    gate.bank.update(t.repeat(20), torch.ones(80))
    losses = torch.tensor([1.0, 0.1, 2.0, 0.2], requires_grad=True)
    loss = gate(losses, t)
    loss.backward()
    assert loss.item() == 1.5
    assert losses.grad.tolist() == [0.5, 0, 0.5, 0]
    assert gate.num_kept == 2
    assert gate.any_kept()


def test_nothing_kept_is_zero_with_zero_gradient_and_says_so():
    gate = LossGate(10, 0.5)
    t = torch.zeros(3, dtype=torch.int64)
    gate.bank.update(t.repeat(20), torch.ones(60))
    weight = torch.tensor(0.1, requires_grad=True)
    loss = gate(weight * torch.ones(3), t)
    loss.backward()
    assert (loss.item(), weight.grad.item(), gate.any_kept()) == (0.0, 0.0, False)


def test_a_loss_at_the_threshold_is_kept_and_one_that_is_no_number_too():
    decision = decide(torch.tensor([0.5, 0.49, math.nan, math.inf]), torch.ones(4), 0.5)
    assert decision.keep.tolist() == [True, False, True, True]


def test_skip_ratio_zero_is_the_plain_mean_bit_for_bit():
    gate, losses = LossGate(10, 0.0), torch.rand(37)
    for _ in range(3):
        assert torch.equal(gate(losses, torch.randint(10, (37,))), losses.sum() / 37)


def test_half_precision_losses_are_judged_in_fp32():
    gate = LossGate(4, 0.5)
    losses = torch.full((2,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    gate(losses, torch.tensor([0, 1])).backward()
    assert gate.bank.values.dtype == torch.float32
    torch.testing.assert_close(gate.bank.values[:2], 0.2 * losses.detach().float())
    assert losses.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("losses", "timesteps", "indices", "message"),
    [
        (torch.tensor(1.0), torch.tensor([1]), torch.tensor([1]), "reduction="),
        (torch.ones(2, 3, 4, 4), torch.tensor([1, 2]), torch.tensor([1, 2]), "mean over all dimensions"),
        (torch.ones(2), torch.tensor([1]), torch.tensor([1, 2]), "differ in shape"),
        (torch.ones(2), torch.tensor([1, 10]), torch.tensor([1, 2]), r"0\.\.9"),
        (torch.ones(2), torch.tensor([-1, 3]), torch.tensor([1, 2]), r"0\.\.9"),
        (torch.ones(2), torch.tensor([0.5, 3]), torch.tensor([1, 2]), "timesteps must be whole numbers"),
        (torch.ones(2), torch.tensor([1, 3]), torch.tensor([1.0, 2]), "indices must be whole numbers"),
        (torch.ones(2), torch.tensor([1, 3]), None, "as indices"),
        (torch.ones(2), torch.tensor([1, 3]), torch.tensor([0, 4]), r"0\.\.3"),
        (torch.ones(2), torch.tensor([1, 3]), torch.tensor([0, -1]), r"0\.\.3"),
    ],
)
def test_wrong_calls_say_what_to_pass_and_change_nothing(losses, timesteps, indices, message):
    gate = LossGate(10, ledger=Ledger(4))
    with pytest.raises(ValueError, match=message):
        gate(losses, timesteps, indices)
    assert gate.bank.visits.sum() == 0
    assert gate.ledger.visits.sum() == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: LossGate(10, -0.1),
        lambda: LossGate(10, math.nan),
        lambda: LossGate(10, bank=LossBank(11)),
        lambda: LossBank(10, decay=1.0),
        lambda: LossBank(10, decay=-0.1),
        lambda: LossBank(10, bins=0),
        lambda: LossBank(10, bins=11),
        lambda: LossBank(10, smooth=-1),
        lambda: LossBank(0),
        lambda: LossGate(0),
        lambda: Ledger(0),
        lambda: Ledger(-1),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"must|is for"):
        make()


def test_a_move_restarts_the_count_that_redistribution_goes_by_and_no_other():
    ledger = Ledger(3)
    ledger.record(torch.tensor([0, 1, 1]), torch.ones(3), torch.tensor([True, True, True]))
    ledger.moved(torch.tensor([1]))
    assert ledger.skips_since_move.tolist() == [1, 0, 0]
    assert ledger.skips.tolist() == [1, 2, 0]
    assert ledger.moves.tolist() == [0, 1, 0]
    ledger.record(torch.tensor([1]), torch.ones(1), torch.tensor([True]))
    assert ledger.skips_since_move.tolist() == [1, 1, 0]


def test_the_last_ratio_is_of_the_last_visit_in_the_batch():
    ledger = Ledger(2)
    ledger.record(torch.tensor([0, 0, 0]), torch.tensor([3.0, 2.0, math.inf]), torch.zeros(3, dtype=torch.bool))
    assert ledger.columns()["last_ratio"].tolist()[0] == 2.0
    assert math.isnan(ledger.columns()["last_ratio"][1])


def make_gate(**options):
    return LossGate(20, 0.7, bank=LossBank(20, **options), ledger=Ledger(6))


@pytest.mark.parametrize("options", [{}, {"bins": 4, "smooth": 1}, {"warm_start": True}])
def test_state_round_trip_goes_on_bit_for_bit(options):
    draw = torch.Generator().manual_seed(1)
    steps = [
        (torch.rand(9, generator=draw), torch.randint(20, (9,), generator=draw), torch.randint(6, (9,), generator=draw))
        for _ in range(8)
    ]
    undisturbed, first, second = make_gate(**options), make_gate(**options), make_gate(**options)
    expected = [undisturbed(*step) for step in steps]
    found = [first(*step) for step in steps[:4]]
    state = first.state_dict()
    first(*steps[0])  # the state is a copy, which this must not reach
    second.load_state_dict(state)
    found += [second(*step) for step in steps[4:]]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.equal(second.bank.values, undisturbed.bank.values)
    for name, column in undisturbed.ledger.columns().items():
        np.testing.assert_array_equal(second.ledger.columns()[name], column)


def test_state_of_another_size_is_refused():
    with pytest.raises(RuntimeError):
        LossBank(10).load_state_dict(LossBank(11).state_dict())
    with pytest.raises(RuntimeError):
        Ledger(10).load_state_dict(Ledger(11).state_dict())


# Variants of the rule.


def visited_gate(skip_ratio=0.5, **rule):
    """Of 10 timesteps: the bank says 2 everywhere; of 4 samples the ledger knows ratios of 0 and 1 only."""
    gate = LossGate(10, skip_ratio, bank=LossBank(10, decay=0.0), ledger=Ledger(4), **rule)
    gate.bank.update(torch.arange(10), torch.full((10,), 2.0))
    gate.ledger.record(torch.tensor([0, 0, 1]), torch.tensor([0.3, 0.4, 5.0]), torch.zeros(3, dtype=torch.bool))
    return gate


def test_a_soft_gate_weighs_by_loss_over_threshold_and_its_gradient_is_that_of_the_weighted_mean():
    gate, t = visited_gate(0.8, soft=True), torch.tensor([1, 2, 3, 4])
    losses = torch.tensor([0.4, 1.6, 7.0, 0.0], requires_grad=True)
    loss = gate(losses, t, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    weights = [0.4 / 1.6, 1.0, 1.0, 0.0]
    assert loss.item() == pytest.approx((0.4 * weights[0] + 1.6 + 7.0) / sum(weights))
    np.testing.assert_allclose(losses.grad, [w / sum(weights) for w in weights], rtol=1e-6)
    assert gate.num_kept == sum(weights)
    assert gate.ledger.skips.tolist() == [1, 0, 0, 1], "what is below the threshold counts, whatever its weight"


def test_a_soft_gate_below_a_weight_of_one_in_all_does_not_scale_its_gradient_up():
    gate = visited_gate(0.5, soft=True)
    losses = torch.tensor([0.1, 0.2], requires_grad=True)
    assert gate(losses, torch.tensor([1, 2]), torch.tensor([0, 1])).item() == pytest.approx(0.1 * 0.1 + 0.2 * 0.2)


@pytest.mark.parametrize("soft", [False, True])
def test_history_judges_by_the_image_and_not_by_this_draw(soft):
    gate = visited_gate(0.5, signal="history", soft=soft)
    # Running ratios: 0.3 and 0.4 folded, 5.0, and two of which nothing is known.
    folded = (RUNNING_DECAY * 0.3 + 0.4) / (RUNNING_DECAY + 1)
    decision = gate.decide(torch.tensor([100.0, 1e-9, 1e-9, 100.0]), torch.arange(4), torch.arange(4))
    np.testing.assert_allclose(decision.weight, [folded / 0.5 if soft else 0.0, 1, 1, 1], rtol=1e-6)
    assert decision.skipped.tolist() == [True, False, False, False]
    np.testing.assert_allclose(decision.ratio, [50, 5e-10, 5e-10, 50], rtol=1e-6)


def test_skipping_at_some_timesteps_only():
    gate = visited_gate(timesteps=(3, 5))
    decision = gate.decide(torch.full((10,), 0.1), torch.arange(10), torch.zeros(10, dtype=torch.int64))
    assert decision.keep.tolist() == [not 3 <= t <= 5 for t in range(10)]


def test_an_absolute_limit_needs_no_bank():
    gate = LossGate(10, 0.5, absolute=0.3)
    losses = torch.tensor([0.1, 0.3, 0.29, math.nan])
    assert gate.decide(losses, torch.arange(4)).keep.tolist() == [False, True, False, True]
    assert LossGate(10, 0.5, absolute=0.3, soft=True).decide(losses, torch.arange(4)).weight[0] == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=60)
@given(batches=batches, target=st.sampled_from([0.0, 0.3, 1.0]), first=st.integers(0, 6), history=st.booleans())
def test_an_adaptive_skip_ratio_equals_a_loop_over_samples(batches, target, first, history):
    rate, reference = 0.5, 0.7
    gate = LossGate(
        TIMESTEPS, reference, ledger=Ledger(SAMPLES), timesteps=(first, TIMESTEPS - 1), target_skip_rate=target,
        adaptation_rate=rate, signal="history" if history else "sample",
    )  # fmt: skip
    for batch in batches:
        t, index, loss, _ = (torch.tensor(column) for column in zip(*batch, strict=True))
        measured = gate.ledger.measured.clone()
        decision = gate.decide(loss, t, index)
        gate.record(decision, loss, t, index)
        total = 0.0
        for row, (step, position, _, _) in enumerate(batch):
            known = measured[position] > 0 if history else math.isfinite(decision.ratio[row])
            if known and step >= first:
                total += target - float(decision.skipped[row])
        reference = min(max(reference * math.exp(rate * total / len(batch)), 1e-3), 1e3)
        assert float(gate.skip_ratio) == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("target", [0.1, 0.5])
def test_an_adaptive_skip_ratio_comes_to_skip_the_wanted_share(soft, target):
    gate, draw = LossGate(10, 0.5, soft=soft, target_skip_rate=target), torch.Generator().manual_seed(0)
    skipped = []
    for _ in range(600):
        t = torch.randint(10, (32,), generator=draw)
        losses = (1 + t) * torch.rand(32, generator=draw).exp()
        decision = gate.decide(losses, t)
        gate.record(decision, losses, t)
        skipped.append(decision.skipped.float().mean())
    assert torch.stack(skipped[300:]).mean() == pytest.approx(target, abs=0.02)


def test_the_state_of_an_adaptive_skip_ratio_round_trips():
    first, second = (LossGate(10, 0.5, target_skip_rate=0.3, adaptation_rate=1.0) for _ in range(2))
    for _ in range(3):
        first(torch.rand(8), torch.arange(8))
    assert float(first.skip_ratio) != 0.5
    second.load_state_dict(first.state_dict())
    assert second.readings() == first.readings() == {"skip_ratio": float(first.skip_ratio)}
    before = float(second.skip_ratio)
    first(torch.rand(8), torch.arange(8))
    assert float(second.skip_ratio) == before
    assert LossGate(10).readings() == {}


def test_history_without_a_ledger_is_refused():
    with pytest.raises(ValueError, match="ledger="):
        LossGate(10, signal="history")
    gate = LossGate(10, signal="history", ledger=Ledger(4))
    with pytest.raises(ValueError, match="as indices"):
        gate.decide(torch.ones(2), torch.tensor([1, 2]))
