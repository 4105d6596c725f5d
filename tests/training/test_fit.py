import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn
from waiting import Clock

from sage.errors import CheckpointError, DivergedError
from sage.randomness import generator
from sage.training import checkpoint
from sage.training.loop import Schedule, fit
from sage.training.selection import Validation

IDENTITY = {"case": "line"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(net, bad=None):
    """A regression whose data are drawn from the step; at step `bad` it is not finite."""

    def loss(step):
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(step))
        error = (net(x)[:, 0] - x.prod(1)).square().mean()
        return {"loss": error * (torch.inf if step == bad else 1), "error": error}

    return loss


def train(folder, net=None, on_step=lambda step, values: None, bad=None, calls=MappingProxyType({}), **changes):
    net = net or network()
    settings = {
        "steps": 20,
        "learning_rate": 0.01,
        "warmup": 3,
        "decay": 5,
        "ema": 0.9,
        "checkpoint_every": 6,
    } | changes
    done = fit(net, loss_of(net, bad), Schedule(**settings), work=folder, identity=IDENTITY, on_step=on_step, **calls)
    return net, done.losses


def state_of(folder):
    """What the newest checkpoint holds, but for the seconds that it took."""
    saved = checkpoint.latest(folder, IDENTITY)
    state = {name: value for name, value in saved.state.items() if name != "seconds"}
    return saved.step, {name: tensor.tolist() for name, tensor in saved.tensors.items()}, state


class Killed(Exception):
    pass


def kill_at(step):
    def on_step(done, values):
        if done == step:
            raise Killed

    return on_step


def test_the_rate_rises_stays_and_falls_to_zero():
    schedule = Schedule(10, 1.0, warmup=4, decay=2)
    assert [schedule.rate(step) for step in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]
    assert Schedule(10, 1.0, warmup=0, decay=0).rate(9) == 1
    assert [Schedule(99, 1.0, warmup=4, decay=2).rate(step) for step in range(8)] == [
        Schedule(10, 1.0, warmup=4, decay=2).rate(step) for step in range(8)
    ]


def test_every_key_has_its_own_randomness():
    def draw(*key):
        return tuple(torch.randn(4, generator=generator(*key)).tolist())

    keys = [(seed, step) for seed in (0, 1, 2**31) for step in range(50)] + [(0, "order", 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(3, 5) == draw(3, 5)


def test_training_lowers_the_loss_and_leaves_averaged_weights(tmp_path):
    seen = []
    net, values = train(
        tmp_path, on_step=lambda step, v: seen.append((step, v)), steps=200, learning_rate=0.02, checkpoint_every=100
    )
    assert [step for step, _ in seen] == list(range(1, 201))
    assert values == seen[-1][1] and values.keys() == {"loss", "error", "gradient_norm"}
    assert values["loss"] < 0.5 * seen[0][1]["loss"]
    saved = checkpoint.latest(tmp_path, IDENTITY)
    for name, p in net.named_parameters():
        assert torch.equal(p, saved.tensors[f"ema.{name}"])
        assert not torch.equal(p, saved.tensors[f"weights.{name}"])
    assert not net.training


def test_the_average_is_the_formula(tmp_path):
    net, weights = network(), []
    start = net[0].weight.detach().clone()
    train(tmp_path, net, lambda step, values: weights.append(net[0].weight.detach().clone()), steps=8)
    average = start
    for step, w in enumerate(weights):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * w
    torch.testing.assert_close(net[0].weight.detach(), average)


@pytest.mark.parametrize("stops", [(1,), (6,), (7, 8), (12, 13, 19), (20,)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stops, tmp_path):
    whole, values = train(tmp_path / "whole")
    steps = []
    for stop in stops:
        with pytest.raises(Killed):
            train(tmp_path / "parts", on_step=kill_at(stop))
    resumed, resumed_values = train(tmp_path / "parts", on_step=lambda step, v: steps.append(step))
    assert resumed_values == values
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    # Weights, averages, optimizer and losses.
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")
    assert steps == list(range((max(stops) - 1) // 6 * 6 + 1, 21))


def test_a_finished_run_is_not_trained_again(tmp_path):
    net, values = train(tmp_path)
    again, same = train(tmp_path, on_step=kill_at(20))
    assert same == values and all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_a_run_can_be_lengthened_before_it_decays(tmp_path):
    whole, _ = train(tmp_path / "whole", steps=30)
    with pytest.raises(Killed):
        train(tmp_path / "parts", on_step=kill_at(14), steps=20)
    longer, _ = train(tmp_path / "parts", steps=30)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), longer.parameters(), strict=True))


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        import torch
        folder, here, threads = sys.argv[1:]
        sys.path[:0] = [here, str(Path(here).parent)]
        from test_fit import train
        torch.set_num_threads(int(threads))
        def on_step(step, values):
            if step == 15:
                os.kill(os.getpid(), signal.SIGKILL)
        train(Path(folder), on_step=on_step)
    """)
    command = [sys.executable, "-c", script, tmp_path / "parts", Path(__file__).parent, str(torch.get_num_threads())]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert [path.name[:13] for path in checkpoint.complete(tmp_path / "parts")] == ["step-00000012", "step-00000006"]
    for part in ("parts", "whole"):
        train(tmp_path / part)
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "parts")


@pytest.mark.parametrize("rate", [1e20, 1e38, 3e39])
def test_an_exploding_rate_stops_within_a_step_and_stores_nothing_bad(rate, tmp_path):
    done = []
    with pytest.raises(DivergedError, match="there is no checkpoint yet"):
        train(tmp_path, on_step=lambda step, v: done.append(step), learning_rate=rate, warmup=0, checkpoint_every=1)
    assert done == [1] and not checkpoint.complete(tmp_path)


def test_divergence_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(DivergedError, match=r"step 14: not finite: loss inf.*last good checkpoint is .*step-00000012"):
        train(tmp_path, bad=14)
    saved = checkpoint.latest(tmp_path, IDENTITY)
    assert saved.step == 12 and all(tensor.isfinite().all() for tensor in saved.tensors.values())


def test_weights_that_overflow_in_the_last_step_are_not_stored(tmp_path):
    with pytest.raises(DivergedError, match="step 1: not finite: the weights"):
        train(tmp_path, steps=1, warmup=0, decay=0, learning_rate=3e39)
    assert not checkpoint.complete(tmp_path)


def test_another_configuration_is_refused(tmp_path):
    net, _ = train(tmp_path)
    with pytest.raises(CheckpointError, match="case: saved 'line', now 'curve'"):
        fit(net, loss_of(net), Schedule(20, 0.01), work=tmp_path, identity={"case": "curve"})


def test_frozen_parameters_stay(tmp_path):
    net = network()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    train(tmp_path, net)
    assert torch.equal(net[0].weight, before)
    assert not any(".0." in name for name in checkpoint.latest(tmp_path, IDENTITY).tensors)


def test_reports_come_once_each_however_often_the_run_is_killed(tmp_path):
    whole = []
    calls = {"on_report": lambda step, means: whole.append((step, means))}
    train(tmp_path / "whole", calls=calls, report_every=4)
    assert [step for step, _ in whole] == [4, 8, 12, 16, 20]
    for stop in (5, 7, 13, 19, None):
        seen = []
        calls = {"on_report": lambda step, means: seen.append((step, means))}  # noqa: B023
        if stop is None:
            train(tmp_path / "parts", calls=calls, report_every=4)
        else:
            with pytest.raises(Killed):
                train(tmp_path / "parts", on_step=kill_at(stop), calls=calls, report_every=4)
    # The last process logged the whole curve: each step once, and the means are those of the uninterrupted run.
    assert [(step, dict(means)) for step, means in seen] == whole


def test_the_losses_of_a_run_reach_its_last_step_and_those_of_a_resumed_one_are_the_same(tmp_path):
    def reports(folder, **calls):
        net = network()
        schedule = Schedule(20, 0.01, warmup=3, decay=5, ema=0.9, checkpoint_every=6, report_every=8)
        return fit(net, loss_of(net), schedule, work=folder, identity=IDENTITY, **calls).reports

    whole = reports(tmp_path / "whole")
    assert [step for step, _ in whole] == [8, 16, 20]
    with pytest.raises(Killed):
        reports(tmp_path / "parts", on_step=kill_at(13))
    assert reports(tmp_path / "parts") == whole == reports(tmp_path / "parts"), "also of a run that was finished"


def test_a_report_is_the_mean_of_its_steps(tmp_path):
    values, reports = [], []
    calls = {"on_report": lambda step, means: reports.append(means["loss"])}
    train(tmp_path, on_step=lambda step, v: values.append(v["loss"]), calls=calls, report_every=5)
    assert reports == pytest.approx([sum(values[k : k + 5]) / 5 for k in (0, 5, 10, 15)])


def test_a_resumed_run_counts_the_seconds_of_all_its_processes(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("sage.training.loop.time", clock)

    def slow(stop):
        def on_step(done, values):
            clock.now += 2
            if done == stop:
                raise Killed

        return on_step

    settings = Schedule(20, 0.01, checkpoint_every=6)
    with pytest.raises(Killed):
        net = network()
        fit(net, loss_of(net), settings, work=tmp_path, identity=IDENTITY, on_step=slow(13))
    net = network()
    done = fit(net, loss_of(net), settings, work=tmp_path, identity=IDENTITY, on_step=slow(None))
    # Killed in step 13, it lost what came after the checkpoint of step 12 and did it again.
    assert done.seconds == 2 * 20 == checkpoint.latest(tmp_path, IDENTITY).state["seconds"]


def test_watching_shows_the_averaged_weights_and_changes_nothing(tmp_path):
    plain, _ = train(tmp_path / "plain")
    net, seen, averages = network(), {}, {}

    def on_watch(step):
        assert not net.training
        seen[step] = [p.detach().clone() for p in net.parameters()]
        averages[step] = checkpoint.latest(tmp_path / "watched", IDENTITY)
        torch.rand(5)  # what is drawn for pictures is not what training draws

    net, _ = train(tmp_path / "watched", net, calls={"on_watch": on_watch}, watch_every=7, checkpoint_every=1)
    assert list(seen) == [7, 14]
    for (name, _), shown in zip(net.named_parameters(), seen[14], strict=True):
        later = checkpoint.latest(tmp_path / "watched", IDENTITY).tensors
        assert not torch.equal(shown, later[f"ema.{name}"]) and not torch.equal(shown, later[f"weights.{name}"])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))
    assert all((a - b).abs().max() < 0.1 for a, b in zip(seen[14], net.parameters(), strict=True))


def split(net):
    """The regression in parts: every `parts`-th of its 32 examples from number `part` on."""

    def loss(step, part=0, parts=1):
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(step))
        errors = (net(x)[:, 0] - x.prod(1)).square()
        return {"loss": errors[part::parts].sum() / 32}

    return loss


@pytest.mark.parametrize("parts", [2, 5, 32])
def test_an_accumulated_gradient_is_that_of_the_whole_batch(parts, tmp_path):
    """After one step Adam's first moment is a tenth of the gradient."""
    moments = []
    for accumulate in (1, parts):
        net = network()
        schedule = Schedule(1, 0.01, max_norm=1e9)
        work = tmp_path / str(accumulate)
        losses = fit(net, split(net), schedule, work=work, identity={}, accumulate=accumulate).losses
        tensors = checkpoint.latest(work, {}).tensors
        moments.append(([tensors[name] for name in sorted(tensors) if name.endswith("exp_avg")], losses))
    for whole, summed in zip(moments[0][0], moments[1][0], strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)
    assert moments[1][1] == pytest.approx(moments[0][1], rel=1e-4)


def falling_then_rising(net, lowest):
    """A held-out loss that is lowest at one step, told by how often it was measured, and the weights at each call."""
    seen = []

    def measure():
        assert not net.training
        seen.append([p.detach().clone() for p in net.parameters()])
        return {"validation_loss": abs(4 * (len(seen) - 1) - lowest) + 1.0}

    return measure, seen


def test_measuring_changes_nothing_and_is_reported(tmp_path):
    plain, _ = train(tmp_path / "plain")
    net, reports = network(), []
    measure, seen = falling_then_rising(net, 8)
    calls = {"validation": Validation(measure, 8), "on_report": lambda step, values: reports.append((step, values))}
    train(tmp_path / "measured", net, calls=calls)
    assert [step for step, values in reports if "validation_loss" in values] == [0, 8, 16, 20]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))
    # The averaged weights are measured.
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], net.parameters(), strict=True))


@pytest.mark.parametrize("keep", ["last", "best"])
def test_training_stops_when_patience_is_over_and_keeps_what_is_asked(keep, tmp_path):
    net = network()
    measure, seen = falling_then_rising(net, 8)
    schedule = Schedule(40, 0.01, checkpoint_every=6)
    validation = Validation(measure, 4, patience=2, keep=keep)
    done = fit(net, loss_of(net), schedule, work=tmp_path, identity=IDENTITY, validation=validation)
    assert done.steps == 16 and [one.step for one in done.history] == [0, 4, 8, 12, 16]
    assert validation.kept(done.history).step == {"last": 16, "best": 8}[keep]
    kept = seen[{"last": 4, "best": 2}[keep]]
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))
    # A finished run does not train, or measure, again.
    again, count = network(), len(seen)
    same = fit(again, loss_of(again), schedule, work=tmp_path, identity=IDENTITY, validation=validation)
    assert (same.steps, same.history, len(seen)) == (16, done.history, count)
    assert all(torch.equal(a, b) for a, b in zip(kept, again.parameters(), strict=True))


@pytest.mark.parametrize("stop", [3, 7, 10, 14, 16])
def test_a_resumed_run_keeps_the_best_weights_and_its_patience(stop, tmp_path):
    def once(folder, net, stop=None):
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(99))

        def measure():
            with torch.no_grad():
                return {"validation_loss": float((net(x)[:, 0] - 0.15).square().mean())}

        validation = Validation(measure, 2, patience=3, keep="best")
        reports = []
        calls = {"on_report": lambda step, values: reports.append((step, values)), "validation": validation}
        on_step = kill_at(stop) if stop else lambda step, values: None
        schedule = Schedule(30, 0.02, warmup=0, checkpoint_every=3, report_every=4, ema=0.5)
        done = fit(net, loss_of(net), schedule, work=folder, identity=IDENTITY, on_step=on_step, **calls)
        return done, [(step, dict(values)) for step, values in reports]

    whole, net = network(), network()
    done, reports = once(tmp_path / "whole", whole)
    best = Validation(dict, 2, keep="best").kept(done.history).step
    assert 0 < best < done.steps < 30, f"it must stop early, after step {best} > 0, for this test to say anything"
    with pytest.raises(Killed):
        once(tmp_path / "parts", network(), min(stop, done.steps))
    resumed, again = once(tmp_path / "parts", net)
    assert (resumed.steps, resumed.history, again) == (done.steps, done.history, reports)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))


def test_a_held_out_loss_that_is_not_finite_stops_training(tmp_path):
    validation = Validation(lambda: {"validation_loss": float("nan")}, 5)
    with pytest.raises(DivergedError, match="step 0: not finite: validation_loss nan"):
        train(tmp_path, calls={"validation": validation})
