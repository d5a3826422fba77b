"""Bits that include the model: everybody has a JPEG decoder; ours is a file of megabytes.

    python -m figures.true_rate --results figures/rate_distortion.json --out figures

Counted over N pictures, each pays model / N. From which N on does it save bits against other
codecs, at equal PSNR (autoencoder) and at equal Frechet distance (HFD)?
"""
import os

import numpy as np

import sample
from figures import codecs, common
from hfd import HFDError

PIXELS = 768 * 512      # of a Kodak picture


def rate_for(value, points, number):
    """Bits per pixel that a codec needs for this value of `number`, on the line between its points;
    None where it does not reach it."""
    x, rates = zip(*sorted((p[number], p["bpp"]) for p in points))
    return float(np.exp(np.interp(value, x, np.log(rates)))) if x[0] <= value <= x[-1] else None


def break_even(point, points, number, model_bits, pixels=PIXELS):
    """From how many pictures on the bits of our point, the model's share included, are fewer than
    the other codec needs for the same `number`. "never" where it needs fewer anyway; None where it
    has no such point."""
    rate = rate_for(point[number], points, number)
    if rate is None:
        return None
    saved = (rate - point["bpp"]) * pixels
    return int(np.ceil(model_bits / saved)) if saved > 0 else "never"


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("true_rate", __doc__, argv, scored=False, level=1,
                     results="figures/rate_distortion.json")
    path, curves, summary = run.args.results, {}, {}
    about, points = common.read_results(path)
    for point in points.values():
        for name, score in point.get("variants", {}).items():
            curves.setdefault(name, []).append(score)
    if missing := {"HFD", "autoencoder", *codecs.CODECS} - set(curves):
        raise HFDError(f"{path}: has no points of {', '.join(missing)}")
    if about["model"]["weights"] != run.about["model"]["weights"]:
        raise HFDError(f"{path}: measured another model than {run.args.model}; run it again")
    sizes = [os.path.getsize(os.path.join(run.args.model, part + ".npz"))
             for part in ("autoencoder", "denoiser")]
    sizes = {"autoencoder": sizes[0], "HFD": sum(sizes)}
    print("model: " + ", ".join(f"{name} {size / 2 ** 20:.1f} MiB" for name, size in sizes.items()))
    realism = "fd" if "fd" in curves["HFD"][0] else "psnr"
    for name, number in (("autoencoder", "psnr"), ("HFD", realism)):
        for codec in codecs.CODECS:
            found = [break_even(p, curves[codec], number, 8 * sizes[name]) for p in curves[name]]
            summary[f"{name}, equal {number}, {codec}"] = found
            print(f"pictures until {name} pays, at equal {number}, against {codec}: {found}")
    figure, (panel,) = common.axes(width=5.5)
    N, point = np.logspace(2, 5, 50), curves["HFD"][run.args.level - 1]
    lines = [(f"HFD, level {run.args.level}", N, point["bpp"] + 8 * sizes["HFD"] / (N * PIXELS),
              (common.LOOK["HFD"][0], ""))]
    for codec in codecs.CODECS:
        if rate := rate_for(point[realism], curves[codec], realism):
            lines.append((codec, N, [rate] * len(N), (common.LOOK[codec][0], "")))
    common.plot(panel, lines, title="Bits for one realism, the model's share included",
                xlabel="pictures that share one model", ylabel="bits per pixel", xscale="log",
                yscale="log")
    run.finish(figure, model_bytes=sizes, break_even_pictures=summary)


if __name__ == "__main__":
    sample.run(main)
