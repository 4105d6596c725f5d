"""Several processes of `torch.distributed`, as `accelerate launch` starts them, do together what one does alone."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sage.training import checkpoint

SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    work, here, accumulate, rank = sys.argv[1:]
    sys.path[:0] = [here, str(Path(here) / "training")]
    import tempfile
    import tiny
    from accelerate import Accelerator
    from sage.training import lora
    from sage.training.denoiser import Denoiser
    from sage.training.loop import Schedule, fit
    from test_denoiser import data_of, loss_of

    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        pipe = tiny.pipeline("stable_diffusion", Path(folder))
    denoiser = Denoiser(pipe)
    data = data_of(denoiser)
    if int(rank):
        lora.add(denoiser.network, int(rank), 0)
    network = accelerator.prepare(denoiser)
    loss = loss_of(network, data, pipe.scheduler, batch_size=7)
    schedule = Schedule(2, 1e-3, warmup=0, max_norm=1e9, checkpoint_every=1)
    fit(network, loss, schedule, work=Path(work), identity={}, accumulate=int(accumulate))
    print(accelerator.num_processes, "processes")
    accelerator.end_training()
""")


def train(work, processes, accumulate, rank):
    """Two steps; return the checkpoint after the first, whose first moment is a tenth of the gradient, and the last."""
    script = work.with_suffix(".py")
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *(start if processes > 1 else start[:1]),
        script,
        work,
        Path(__file__).parents[1],
        str(accumulate),
        str(rank),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=work.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{processes} processes") == processes
    last, first = checkpoint.complete(work)
    return [checkpoint._parse(path, path.read_bytes(), {}) for path in (first, last)]


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "rank"), [pytest.param(1, 0, marks=pytest.mark.stack), (3, 2)])
def test_two_processes_have_the_gradient_and_losses_of_one(accumulate, rank, tmp_path):
    whole = train(tmp_path / "whole", 1, 1, rank)
    halves = train(tmp_path / "halves", 2, accumulate, rank)
    moments = [name for name in whole[0].tensors if name.endswith("exp_avg")]
    assert len(moments) > 20 and all("lora" in name for name in moments) == bool(rank)
    largest = max(float(whole[0].tensors[name].abs().max()) for name in moments)
    for name in moments:
        torch.testing.assert_close(halves[0].tensors[name], whole[0].tensors[name], rtol=1e-3, atol=1e-5 * largest)
    for one, two in zip(whole, halves, strict=True):
        assert two.state["losses"] == pytest.approx(one.state["losses"], rel=1e-3)
