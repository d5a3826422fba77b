"""What a training step spends its time on, against its convolutions and the machine's best.

    python -m figures.speed --out figures

A step of train.py, by its own account, over its convolutions; its operations per second over those
of a large matrix product; for stage 2 also Muon's share, and what a step would take with fresh
pairs in place of the pool. Absolute speeds are told of a GPU only.
"""
import contextlib
import io
import re
import tempfile
from functools import partial
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import hfd
import sample
import train
from figures import common

FIT = train.fit


def operators(device, pattern, function, *args):
    """Seconds that PyTorch's operators of this pattern take in function(*args), the least of three
    calls."""
    time = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"        # microseconds
    found = []
    for _ in range(3):
        with torch.profiler.profile() as profile:
            function(*args)
            sample.clock(device)                            # waits for a GPU
        found.append(sum(getattr(event, time) / 1e6 for event in profile.key_averages()
                         if re.match(pattern, event.key)))
    return min(found)


def parts_of_a_step(bench, run, draw):
    """{name: number} of a step, from what train.fit is given: operations, seconds of parts. Here
    each kernel is started by itself, not recorded: parts of a recording cannot be told apart."""
    device, crop, batch = run.device, run.args.crop, run.args.batch
    autocast = partial(torch.autocast, device.type, torch.bfloat16, hfd.fast_bf16(device))

    def drawn(step):
        """The batch of that step."""
        with autocast():
            return draw(step, crop, batch)

    def compute(step):
        """The two passes of one step."""
        given = drawn(step)
        with autocast():
            loss = run.model(*given)["loss"].mean()
        loss.backward()
    with FlopCounterMode(display=False) as counter:
        for n in range(train.POOL):
            compute(n)
    found = {"batch": batch, "crop": crop, "operations": counter.get_total_flops() / train.POOL,
             "convolutions": operators(device, "aten::.*convolution", compute, 0)}
    if isinstance(run.optimizers[-1], train.Muon):
        found["muon"] = operators(device, "aten::", run.optimizers[-1].step)
        # The first step of a pool makes POOL / 4 batches of pairs, the second uses them.
        times = [bench.timed(drawn, train.POOL * n + which)[1] for n in (1, 2, 3)
                 for which in (0, 1)]
        found["pairs"] = (min(times[::2]) - min(times[1::2])) / (train.POOL // 4)
    return found


def main(argv=None):
    """Both stages, on dead leaves, which cost as much as photographs once they are in memory."""
    bench = common.Run("speed", __doc__, argv, scored=False, batch=None)
    results, cuda, bf16 = {}, bench.device.type == "cuda", hfd.fast_bf16(bench.device)
    n, part = 8192 if cuda else 2048, {}
    a = torch.randn(n, n, device=bench.device).to(torch.bfloat16 if bf16 else torch.float32)
    best = 2 * n ** 3 / min(bench.timed(torch.matmul, a, a)[1] for _ in range(3))

    def instead(run, draw):
        """What train.py calls in place of its loop, and then that loop."""
        part.update(parts_of_a_step(bench, run, draw))
        FIT(run, draw)
    with tempfile.TemporaryDirectory() as folder, mock.patch("train.fit", instead):
        words = ["--init", bench.args.model, "--out", folder, "--device", bench.args.device]
        words += ["--batch", str(bench.args.batch)] if bench.args.batch else []
        for stage in ("autoencoder", "diffusion"):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                train.main([stage, *words, "--steps", "64", "--log-every", "16"])
            # It tells of steps 1, 16, 32, 48 and 64: the second is still cold, the last has larger
            # crops.
            step = 1 / max(map(float, re.findall(r"([\d.]+) steps/s", said.getvalue())[2:4]))
            found = {"batch": part["batch"], "crop": part["crop"], "operations": part["operations"],
                     "step_over_convolutions": step / part["convolutions"],
                     "share_of_matrix_product": part["operations"] / step / best}
            if stage == "diffusion":    # with fresh pairs, a step would make four times as many
                found |= {"muon_share": part["muon"] / step,
                          "fresh_pairs_over_pool": 1 + 0.75 * part["pairs"] / step}
            found |= {"crops_per_second": part["batch"] / step} if cuda else {}
            results[stage] = {name: float(f"{value:.3g}") for name, value in found.items()}
            print(f"{stage} on {train.hardware(bench.device)}: {results[stage]}")
    bench.finish(stages=results)


if __name__ == "__main__":
    sample.run(main)
