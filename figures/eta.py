"""Which noise schedule is best? One net, which sees log SNR, sampled under every eta; and nets that were trained under others.

    python -m figures.eta --images KODAK --out figures

The paper shifts the cosine schedule by eta = 0.5 and does not vary it. At t = 1/2 noise and signal stand at sigma / alpha = eta. Noise far above
the residual x - x_hat hides everything but x_hat, noise far below it leaves nothing to decide: so the best eta should lie near the residual's
standard deviation (dotted), and fall as the rate rises. (eta = 0 is left out: without any noise there is nothing to sample.)
"""
from pathlib import Path

import numpy as np

import hfd
from figures import common, metrics
from hfd import HFDError

ETAS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FEWER = (0.025, 0.05, 0.1, 0.2, 0.5, 1.0)                    # for the retrained nets


def flags(parser):
    """The flags of this script alone."""
    parser.add_argument("--sampler", choices=sorted(hfd.SAMPLERS), default="dpm", help="how to sample")
    parser.add_argument("--retrained", metavar="FILE", nargs="+", default=[],
                        help="up to four more checkpoints with the same autoencoder, trained at other eta or --plain")


def main(argv=None):
    """Sample with every net under every eta, print the best, draw."""
    run = common.Run("eta", __doc__, argv, flags, levels=[1, 4], steps=hfd.STEPS)
    nets = {"this model": run.model.diffusion} | {Path(path).stem: run.other(path) for path in run.args.retrained}
    if len(nets) > len(common.CYCLE):
        raise HFDError(f"--retrained: at most {len(common.CYCLE) - 1} nets, or the plot has no colour left for them")
    # The residual's standard deviation on these very pictures, in the units of x: 2 / 255 for a step of a pixel.
    std = {level: 2 * np.sqrt(np.mean([10 ** (-psnr / 10) for psnr in run.blurry(level)["psnr_each"]])) for level in run.args.levels}
    curves, summary = {}, []
    for level in run.args.levels:
        bests = {}                                          # of the nets so far, the point with the smallest distance
        for name, net in nets.items():
            etas = (ETAS if net is run.model.diffusion else FEWER)[::5 if run.args.quick else 1]
            points = curves[level, name] = {eta: run.sampled(f"level {level}, {name}, sampled at eta {eta:g}", level, net, eta=eta, steps=run.args.steps,
                                                             sampler=run.args.sampler) for eta in etas}
            best = {n: (min if n == "fd" else max)(etas, key=lambda eta: points[eta][n]) for n in run.numbers}
            row = {"level": level, "net": name, "trained_at": net.config.eta, "preconditioned": net.config.preconditioned,
                   "residual_std": round(std[level], 4), "best_eta": best, "at_best": {n: round(points[best[n]][n], 2) for n in run.numbers}}
            print(f"level {level}, {name}: residual {std[level]:.3f}, best " + ", ".join(f"{n} {points[e][n]:.2f} at eta {e:g}" for n, e in best.items()))
            if run.features:
                row["fd_over_best"] = {eta: metrics.fd_ratio(point, points[best["fd"]]) for eta, point in points.items()}
                row["best_over"] = {other: metrics.fd_ratio(points[best["fd"]], point) for other, point in bests.items()}
                bests[name] = points[best["fd"]]
                listed = lambda ratios: ", ".join(f"{x}: {r:.3f} [{low:.3f}, {high:.3f}]" for x, (r, low, high) in ratios.items())
                print("    times the best: " + listed(row["fd_over_best"]))
                if row["best_over"]:
                    print("    its best over that of others: " + listed(row["best_over"]))
            summary.append(row)
    figure, panels = common.axes(len(run.numbers), rows=len(run.args.levels), width=4.6, height=3.3)
    for level in run.args.levels:
        lines = {}
        for look, (name, net) in zip(common.CYCLE, nets.items()):
            kind = ("trained" if net.config.preconditioned else "plain, trained") + f" at eta {net.config.eta:g}"
            label = name if net is run.model.diffusion or kind in lines else kind
            lines[label] = *look, "-", curves[level, name]
        for number in run.numbers:
            panel, ends = panels.pop(0), []
            panel.axvline(std[level], color=common.GREY, linestyle=":", linewidth=1)
            panel.annotate("the residual's\nstandard deviation", (std[level], 0.98), (3, 0), xycoords=("data", "axes fraction"),
                           textcoords="offset points", fontsize=7, color=common.GREY, va="top", zorder=1)
            if number == "fd":
                ends.append((ETAS[-1], run.blurry(level)["fd"], "autoencoder", common.GREY))
                panel.axhline(ends[-1][1], color=common.GREY, linewidth=0.7)
            common.curves(panel, run, number, lines, "eta of the sampler's schedule", FEWER, ends=ends)
            panel.set_title(f"Level {level}. {common.TITLES[number]}")
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    hfd.run(main)
