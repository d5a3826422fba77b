"""What a training step spends its time on, against its convolutions and the machine's best.

    python -m figures.speed --out figures

A step of train.py over its convolutions alone, one by one in the same shapes (below that no
rearrangement goes); its operations per second over the best in a large matrix product; for stage 2
also what the pool of pairs saves, and Muon's share. Absolute numbers are told of a GPU only.
"""
import contextlib
import functools
import io
import itertools
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import hfd
import sample
import train
from figures import common

FIT = train.fit


class Enough(Exception):
    """Ends train.fit."""


def seconds_per_step(rounds, run, batch_loss):
    """Seconds of a step of train.fit, in the fastest of some rounds of POOL steps; one more warms
    up."""
    marks, calls = [], itertools.count()

    def marked(*given):
        """batch_loss, which opens every step."""
        if next(calls) % train.POOL == 0:
            marks.append(sample.clock(run.device))
            if len(marks) == rounds + 2:
                raise Enough
        return batch_loss(*given)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
        FIT(run, marked)
    return min(b - a for a, b in zip(marks[1:], marks[2:])) / train.POOL


def measure(bench, run, batch_loss):
    """Takes what train.fit is given, and measures instead of training: {name: ratio}."""
    device, bf16, calls = run.device, hfd.fast_bf16(run.device), []
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)

    def compute(step):
        """The two passes of one step."""
        with autocast():
            loss = batch_loss(step, run.args.crop, run.args.batch)["loss"]
        loss.backward()

    def keep(module, given, _):
        """A hook that keeps a convolution and what it was given."""
        calls.append((module, given[0].detach().clone().requires_grad_()))

    def convolve(module, x):
        """The two passes of one convolution."""
        with autocast():
            y = module(x)
        y.backward(torch.ones_like(y))
    rounds = 1 if bench.args.quick else 3
    step = seconds_per_step(rounds, run, batch_loss)
    with torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as counter:
            for n in range(train.POOL):
                compute(n)
        hooks = [module.register_forward_hook(keep) for module in run.model.modules()
                 if isinstance(module, torch.nn.Conv2d)]
        compute(0)
        for hook in hooks:
            hook.remove()
        alone = sum(min(bench.timed(convolve, *call)[1] for _ in range(3)) for call in calls)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(torch.bfloat16 if bf16 else torch.float32)
    best = 2 * n ** 3 / min(bench.timed(torch.matmul, a, a)[1] for _ in range(3 * rounds))
    rate = counter.get_total_flops() / train.POOL / step
    found = {"step_over_convolutions": step / alone, "share_of_matrix_product": rate / best}
    muon = run.optimizers[-1]
    if isinstance(muon, train.Muon):
        found["muon_share"] = min(bench.timed(muon.step)[1] for _ in range(3)) / step
        # A pool for four steps has just one batch of pairs; and a step that counts as four wants a
        # new one every time.
        with mock.patch("train.POOL", 4):
            fresh = seconds_per_step(rounds, run, lambda n, *how: batch_loss(4 * n, *how))
        found["fresh_pairs_over_pool"] = fresh / step
    if device.type == "cuda":
        found |= {"crops_per_second": run.args.batch / step, "teraflops": rate / 1e12}
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def main(argv=None):
    """Both stages, on dead leaves, which cost as much as photographs once they are in memory."""
    bench = common.Run("speed", __doc__, argv, scored=False, stage1=True, batch=None)
    args, results = bench.args, {}
    for stage in ("autoencoder", "diffusion"):
        flags = ["--device", args.device] + (["--batch", str(args.batch)] if args.batch else [])

        def instead(run, batch_loss):
            """What train.py calls in place of its loop."""
            results[stage] = {"batch": run.args.batch, "crop": run.args.crop,
                              **measure(bench, run, batch_loss)}
            print(f"{stage} on {train.hardware(run.device)}: {results[stage]}")
        with tempfile.TemporaryDirectory() as folder, mock.patch("train.fit", instead):
            if stage == "diffusion":
                shutil.copy(Path(args.model, "autoencoder.npz"), folder)
            if stage == "autoencoder" or bench.model.diffusion:
                flags += ["--init", args.model]
            train.main([stage, "--out", folder, *flags])
    bench.finish(stages=results)


if __name__ == "__main__":
    sample.run(main)
