"""What it costs in truth: bits that include the model, and computing.

    python -m figures.true_rate --results figures/rate_distortion.json --out figures

Everybody has a JPEG decoder; ours is a file of megabytes. Counted over N pictures, each pays model / N. From which N on does it save bits against other codecs, at
equal PSNR (autoencoder) and at equal Frechet distance (HFD)? And what do decoders pay in computing: multiply-adds and seconds per megapixel.
"""
import json
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


def break_even(ours, theirs, number, model_bits, pixels):
    """For each of our points: from how many pictures on its bits, the model's share included, are fewer than the other codec needs for
    the same `number`, on the line between its points. "never" where it needs fewer anyway; None where it has no such point."""
    def one(point):
        """The number of pictures for one of our points, "never" or None."""
        x, rates = zip(*sorted((p[number], p["bpp"]) for p in theirs))
        if not x[0] <= point[number] <= x[-1]:
            return None
        saved = float(np.exp(np.interp(point[number], x, np.log(rates)))) - point["bpp"]
        return int(np.ceil(model_bits / (saved * pixels))) if saved > 0 else "never"
    return [one(point) for point in ours]


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
    return result


def main(argv=None):
    """Break-even numbers from measured curves, operation counts from the networks."""
    run = common.Run("true_rate", __doc__, argv, flags)
    if not os.path.isfile(run.args.results):
        raise HFDError(f"{run.args.results}: no such file; make it with python -m figures.rate_distortion")
    points = json.loads(Path(run.args.results).read_text())["points"]
    model_bits, pixels = 8 * os.path.getsize(run.args.model), run.args.pixels
    ours = {name: [p["variants"][name] for key, p in points.items() if key.startswith("level")] for name in ("autoencoder", "HFD")}
    summary = {}
    for codec in codecs.CODECS:
        theirs = [p["variants"][codec] for p in points.values() if codec in p["variants"]]
        for name, number in (("autoencoder", "psnr"), ("HFD", "fd")):
            if number in ours[name][0]:
                summary[f"{name}, equal {number}, {codec}"] = break_even(ours[name], theirs, number, model_bits, pixels)
    for name, pictures in summary.items():
        print(f"{name}: " + ", ".join(f"level {i + 1} {'-' if n is None else n}" for i, n in enumerate(pictures)) + " pictures")
    cost = run.point("computing", lambda: {"per_megapixel": computing(run)})["per_megapixel"]
    for name, c in cost.items():
        print(f"{name:36} {c['gmac']:9.1f} GMAC, {c['seconds']:7.2f} s per megapixel")
    figure, panels = common.axes(2)
    N, ends = np.logspace(0, 5, 50), []
    for (colour, marker), (i, point) in zip(common.CYCLE, list(enumerate(ours["HFD"]))[:3]):
        panels[0].plot(N, point["bpp"] + model_bits / (N * pixels), color=colour)
        ends.append((N[-1], point["bpp"], f"HFD, level {i + 1}", colour))
    for codec in codecs.CODECS:
        p = next(p["variants"][codec] for p in points.values() if codec in p["variants"])
        panels[0].axhline(p["bpp"], color=common.GREY, linestyle=":", linewidth=0.8)
        ends.append((N[-1], p["bpp"], f"{codec}, smallest measured", common.GREY))
    panels[0].set(title="Bits that include the model", xlabel="pictures that share one model", ylabel="bits per pixel", xscale="log", yscale="log")
    panels[1].barh(range(len(cost)), [c["gmac"] for c in cost.values()], color=common.LOOK["HFD"][0], height=0.6)
    panels[1].set_yticks(range(len(cost)), list(cost))
    panels[1].invert_yaxis()
    panels[1].set(title="Computing", xlabel="10⁹ multiply-adds per megapixel", xscale="log")
    common.label_ends(panels[0], ends)
    run.finish(figure, model_bytes=model_bits // 8, break_even_pictures=summary)


if __name__ == "__main__":
    hfd.run(main)
