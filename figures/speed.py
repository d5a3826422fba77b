"""What a training step spends its time on: against its own convolutions, and against the machine's matrix product.

    python -m figures.speed --out figures

Three numbers for each stage. The time of a whole step, as train.py takes it: crops, both passes, clipping, optimizer, average. The time
of its convolutions alone, one by one with the same shapes: below that no rearrangement goes. And the step's operations per second as a share
of the best that this machine does in a large matrix product: how much of what was paid for is used.
"""
import argparse
import contextlib
import io
import json
import os
import tempfile
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import hfd
import sample
import train
from figures.common import timed


def matrix_rate(device):
    """Operations per second of a square matrix product in the precision that training uses: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if hfd.fast_bf16(device) else torch.float32)
    return 2 * n ** 3 / min(timed(torch.matmul, a, a)[1] for _ in range(10))


def convolution_seconds(model, compute, autocast):
    """Seconds of the forward and backward passes of each convolution in `model` that compute() goes through, one by one, summed."""
    calls = []
    hooks = [module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0].detach().clone())))
             for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    compute()
    for hook in hooks:
        hook.remove()

    def both_passes(module, x):
        """One convolution, there and back."""
        with autocast():
            y = module(x.requires_grad_())
        y.backward(torch.ones_like(y))

    return sum(min(timed(both_passes, *call)[1] for _ in range(3)) for call in calls)


def measure(count, args, model, batch_loss, groups, checkpoint, photos, resumed):
    """Takes what train.fit is given, and measures `count` steps of it instead of training. Returns numbers by name."""
    device = hfd.pick_device(args.device)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=hfd.fast_bf16(device))

    def compute():
        """The two passes of one step."""
        with autocast():
            loss = batch_loss(model, args.crop, args.batch)["loss"]
        loss.backward()

    starts = []

    def marked(*given):
        """batch_loss, which opens every step: so from one call to the next is a step, with all that belongs to it."""
        starts.append(hfd.clock(device))
        return batch_loss(*given)

    args.pause_at = count + 2                               # the first step warms up
    with contextlib.redirect_stdout(io.StringIO()), mock.patch("hfd.write_atomically"):
        FIT(args, model, marked, groups, checkpoint, photos, resumed)
    step = float(np.median(np.diff(starts)[1:]))
    with FlopCounterMode(display=False) as counter:
        compute()
    operations, convolutions, best = counter.get_total_flops(), convolution_seconds(model, compute, autocast), matrix_rate(device)
    print(f"{args.stage:12} {args.batch / step:7.1f} images/s of {args.crop} px   step / its convolutions {step / convolutions:.2f}   "
          f"{operations / step / 1e9:.0f} of {best / 1e9:.0f} GFLOP/s = {100 * operations / step / best:.0f} %")
    return {"images_per_second": args.batch / step, "batch": args.batch, "crop": args.crop, "seconds_per_step": step,
            "seconds_of_convolutions": convolutions, "step_over_convolutions": step / convolutions,
            "operations_per_step": operations, "share_of_matrix_product": operations / step / best}


FIT = train.fit


def main(argv=None):
    """Both stages, on dead leaves, which cost as much as photographs once they are in memory."""
    parser = argparse.ArgumentParser(prog="python -m figures.speed", description=__doc__.split("\n")[0],
                                     formatter_class=sample.Help)
    parser.add_argument("--model", metavar="FILE", default=sample.MODEL, help="checkpoint whose autoencoder stage 2 uses")
    parser.add_argument("--out", metavar="DIR", default="runs/figures", help="folder for speed.json")
    parser.add_argument("--count", type=int, default=20, help="steps to time")
    parser.add_argument("--batch", type=int, help="pictures per step in both stages; without it, what train.py has")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    args, results = parser.parse_args(argv), {}
    more = ["--device", args.device] + (["--batch", str(args.batch)] if args.batch else [])
    for stage, inputs in (("autoencoder", []), ("diffusion", ["--autoencoder", args.model])):
        def instead(*given):
            """What train.py calls in place of its loop."""
            results[stage] = {name: float(f"{value:.4g}") for name, value in measure(args.count, *given).items()}
        with tempfile.TemporaryDirectory() as folder, mock.patch("train.fit", instead):
            train.main([stage, "--out", f"{folder}/model.pt", *inputs, *more])
    device = hfd.pick_device(args.device)
    text = json.dumps({"command": "python -m figures.speed --out figures", "hardware": hfd.hardware(device), "torch": str(torch.__version__),
                       "memory": hfd.peak_memory(device), "stages": results}, indent=1)
    os.makedirs(args.out, exist_ok=True)
    hfd.write_atomically(f"{args.out}/speed.json", lambda f: f.write((text + "\n").encode()))
    print(f"wrote {args.out}/speed.json")


if __name__ == "__main__":
    hfd.run(main)
