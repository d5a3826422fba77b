"""Which noise schedule is best? One net, which sees log SNR, sampled under every eta; and nets that were trained under others.

    python -m figures.eta --images KODAK --out figures

The paper shifts the cosine schedule by eta = 0.5 and does not vary it. At t = 1/2 noise and signal stand at sigma / alpha = eta. Noise far above
the residual x - x_hat hides everything but x_hat, noise far below it leaves nothing to decide: so the best eta should lie near the residual's
standard deviation (dotted), and fall as the rate rises. (eta = 0 is left out: without any noise there is nothing to sample.)
"""
from pathlib import Path

import hfd
from figures import common

ETAS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FEWER = (0.025, 0.05, 0.1, 0.2, 0.5, 1.0)                    # for the retrained nets
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))     # one for each net


def flags(parser):
    """The flags of this script alone."""
    parser.add_argument("--sampler", choices=sorted(hfd.SAMPLERS), default="dpm", help="which")
    parser.add_argument("--retrained", metavar="FILE", nargs="+", default=[],
                        help="up to four more checkpoints with the same autoencoder, trained at other eta or --plain")


def main(argv=None):
    """Sample with every net under every eta, print the best, draw."""
    run = common.Run("eta", __doc__, argv, flags, levels=[1, 4], steps=hfd.STEPS)
    nets = {Path(path).stem: hfd.load_model(path, run.device).diffusion for path in [run.args.model, *run.args.retrained]}
    shipped = next(iter(nets))
    std = {level: run.model.diffusion.residual_std[level - 1].square().mean().sqrt().item() for level in run.args.levels}
    curves, summary = {}, []
    for level in run.args.levels:
        for name, net in nets.items():
            etas = (ETAS if name == shipped else FEWER)[::5 if run.args.quick else 1]
            points = curves[level, name] = {eta: run.sampled(f"level {level}, {name}, sampled at eta {eta:g}", level, net, eta=eta, steps=run.args.steps,
                                                             sampler=run.args.sampler) for eta in etas}
            best = {n: (min if n == "fd" else max)(etas, key=lambda eta: points[eta][n]) for n in run.numbers}
            summary.append({"level": level, "net": name, "trained_at": net.config.eta, "preconditioned": net.config.preconditioned,
                            "residual_std": round(std[level], 4), "best_eta": best, "at_best": {n: round(points[best[n]][n], 2) for n in run.numbers}})
            print(f"level {level}, {name}: residual {std[level]:.3f}, best " + ", ".join(f"{n} {points[e][n]:.2f} at eta {e:g}" for n, e in best.items()))
    colours = dict(zip(run.args.levels, common.CYCLE))
    lines = {f"level {level}, {name}": (*colours[level], LINES[list(nets).index(name)], points) for (level, name), points in curves.items()}
    figure, panels = common.axes(len(run.numbers))
    for panel, number in zip(panels, run.numbers):
        ends = []
        for level, (colour, _) in colours.items():
            panel.axvline(std[level], color=colour, linestyle=":", linewidth=1)
            if number == "fd":
                ends.append((ETAS[-1], run.blurry(level)["fd"], f"level {level}, autoencoder", colour))
                panel.axhline(ends[-1][1], color=colour, linewidth=0.7)
        common.curves(panel, run, number, lines, "eta of the sampler's schedule", FEWER, ends=ends)
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    hfd.run(main)
