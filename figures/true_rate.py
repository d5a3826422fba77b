"""What it costs in truth: bits that include the model, and computing.

    python -m figures.true_rate --results figures/rate_distortion.json --out figures

Everybody has a JPEG decoder; ours is a file of megabytes. Counted over N pictures, each pays model / N. From which N on does it save bits against other codecs, at
equal PSNR (autoencoder) and at equal Frechet distance (HFD)? And what do decoders pay in computing: multiply-adds and seconds per megapixel.
"""
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import hfd
from figures import codecs, common
from hfd import HFDError


def flags(parser):
    """The flags of this script alone."""
    parser.add_argument("--results", metavar="FILE", default="figures/rate_distortion.json", help="what figures.rate_distortion wrote")
    parser.add_argument("--pixels", type=int, default=768 * 512, help="pixels of the pictures in those results")


def rate_for(value, theirs, number):
    """Bits per pixel that a codec needs for this value of `number`, on the line between its points; None where it does not reach it."""
    x, rates = zip(*sorted((p[number], p["bpp"]) for p in theirs))
    return float(np.exp(np.interp(value, x, np.log(rates)))) if x[0] <= value <= x[-1] else None


def break_even(point, theirs, number, model_bits, pixels):
    """From how many pictures on the bits of our point, the model's share included, are fewer than the other codec needs for the same
    `number`. "never" where it needs fewer anyway; None where it has no such point."""
    rate = rate_for(point[number], theirs, number)
    if rate is None:
        return None
    return int(np.ceil(model_bits / ((rate - point["bpp"]) * pixels))) if rate > point["bpp"] else "never"


def model_bytes(path):
    """{curve: bytes that its decoder must have beforehand}: the whole checkpoint file for HFD, without stage 2 for the autoencoder alone."""
    packed = hfd.read_checkpoint(path)
    whole, second = os.path.getsize(path), sum(t.nbytes for t in packed["diffusion"]["weights"].values())
    return {"autoencoder": whole - second, "HFD": whole}


def computing(run, side=1024):
    """{part: {"gmac": 10^9 multiply-adds, "seconds"}}, both per megapixel, on a square of noise."""
    autoencoder = run.model.autoencoder
    x = torch.rand(1, 3, side, side, device=run.device) * 2 - 1
    k = autoencoder.encode(x, 0)
    draw = lambda steps, **how: hfd.sample_picture(run.model.diffusion, x, 0, steps, **how)
    parts = {"encoder": lambda: autoencoder.encode(x, 0), "decoder": lambda: autoencoder.decode(k, 0),
             "1 step, no context": lambda: draw(1, context=0), f"1 step, context {hfd.CONTEXT}": lambda: draw(1),
             "1 step, context 128 (exact)": lambda: draw(1, context=128), f"{hfd.STEPS} steps, as decompress": lambda: draw(hfd.STEPS)}
    result = {}
    for name, part in parts.items():
        with FlopCounterMode(display=False) as counter:
            part()
        seconds = min(common.timed(part)[1] for _ in range(2))
        result[name] = {"gmac": round(counter.get_total_flops() / 2e9 * 1e6 / side ** 2, 2), "seconds": round(seconds * 1e6 / side ** 2, 3)}
    result["250 steps (250 times one)"] = {number: round(250 * value, 1) for number, value in result[f"1 step, context {hfd.CONTEXT}"].items()}
    return result


def main(argv=None):
    """Break-even numbers from measured curves, operation counts from the networks."""
    run = common.Run("true_rate", __doc__, argv, flags, level=2)
    if not os.path.isfile(run.args.results):
        raise HFDError(f"{run.args.results}: no such file; make it with python -m figures.rate_distortion")
    results = json.loads(Path(run.args.results).read_text())
    points, sizes, pixels = results["points"], model_bytes(run.args.model), run.args.pixels
    ours = {name: [p["variants"][name] for key, p in points.items() if key.startswith("level")] for name in ("autoencoder", "HFD")}
    summary = {}
    theirs = {codec: [p["variants"][codec] for p in points.values() if codec in p["variants"]] for codec in codecs.CODECS}
    for codec in theirs:
        for name, number in (("autoencoder", "psnr"), ("HFD", "fd")):
            if number in ours[name][0]:
                summary[f"{name}, equal {number}, {codec}"] = [break_even(p, theirs[codec], number, 8 * sizes[name], pixels) for p in ours[name]]
    print("model: " + ", ".join(f"{name} {size / 2 ** 20:.1f} MiB" for name, size in sizes.items()))
    for name, pictures in summary.items():
        print(f"{name}: " + ", ".join(f"level {i + 1} {'-' if n is None else n}" for i, n in enumerate(pictures)) + " pictures")
    cost = run.point("computing", lambda: {"per_megapixel": computing(run)})["per_megapixel"]
    for name, c in cost.items():
        print(f"{name:36} {c['gmac']:9.1f} GMAC, {c['seconds']:7.2f} s per megapixel")
    # One level, and what the others need for the same Frechet distance (for the same PSNR, where that was not measured).
    number = "fd" if "fd" in ours["HFD"][0] else "psnr"
    figure, panels = common.axes(2, width=4.8)
    model_bits = 8 * sizes["HFD"]
    N, point = np.logspace(2, 5, 50), ours["HFD"][run.args.level - 1]
    panels[0].plot(N, point["bpp"] + model_bits / (N * pixels), color=common.LOOK["HFD"][0])
    ends = [(N[-1], point["bpp"] + model_bits / (N[-1] * pixels), f"HFD, level {run.args.level}", common.LOOK["HFD"][0])]
    rates = {codec: rate for codec in theirs if (rate := rate_for(point[number], theirs[codec], number)) is not None}
    for codec, rate in rates.items():
        (colour, marker), above = common.LOOK[codec], rate > np.median(list(rates.values()))        # half of the labels above their lines
        panels[0].plot(N, np.full(len(N), rate), color=colour, linewidth=1)
        ends.append((N[-1], rate, codec, colour))
        if rate > point["bpp"]:
            crossing = model_bits / ((rate - point["bpp"]) * pixels)
            panels[0].plot(crossing, rate, color=colour, marker=marker)
            panels[0].annotate(f"{math.ceil(crossing):,}", (crossing, rate), (-12, 1) if above else (-5, -2), textcoords="offset points",
                               fontsize=8, color=colour, ha="right", va="bottom" if above else "top")
    panels[0].set(title="Bits for one realism, the model's share included", xlabel="pictures that share one model", ylabel="bits per pixel",
                  xscale="log", yscale="log")
    common.plain_log_ticks(panels[0])
    gmac = [c["gmac"] for c in cost.values()]
    panels[1].plot(gmac, range(len(cost)), "o", color=common.LOOK["HFD"][0])
    for y, c in enumerate(cost.values()):
        panels[1].annotate(f"{c['gmac']:,.0f}; {c['seconds']:.3g} s", (c["gmac"], y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    panels[1].set_yticks(range(len(cost)), list(cost))
    panels[1].invert_yaxis()
    panels[1].set(title="Computing", xlabel="10⁹ multiply-adds per megapixel, and seconds here", xscale="log", xlim=(min(gmac) / 2, 30 * max(gmac)))
    common.label_ends(panels[0], ends)
    run.finish(figure, model_bytes=sizes, break_even_pictures=summary, results={"command": results["command"], "pictures": results["about"]["pictures"]})


if __name__ == "__main__":
    hfd.run(main)
