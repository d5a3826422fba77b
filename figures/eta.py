"""Which noise schedule is best? One net sampled under every eta, and nets trained under others.

    python -m figures.eta --images KODAK --middle 256 --others runs/eta0.5 runs/eta1 --out figures

Noise far above the residual x - x_hat hides all but x_hat, noise far below it leaves nothing to
decide: so the best eta should grow with the residual's standard deviation (dotted).
"""
from pathlib import Path

import sample
from figures import common

ETAS = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0)    # at 0 there is nothing to sample


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("eta", __doc__, argv, levels=[1, 4], others=[])
    nets, rows, first = {"this model": run.model.diffusion}, [], run.numbers[0]
    nets |= {Path(folder).name: run.other(folder).diffusion for folder in run.args.others}
    figure, panels = common.axes(len(run.numbers), rows=len(run.args.levels), width=4.6, height=3.3)
    for level in run.args.levels:
        blurry, curves = run.blurry(level), {}
        best = {"the autoencoder": blurry}
        std = blurry["mse"] ** 0.5 / 127.5                      # of x in [-1, 1]
        for name, net in nets.items():
            points = curves[name] = {
                eta: run.sampled(f"level {level}, {name}, eta {eta:g}", level, net, eta=eta)
                for eta in (ETAS[1::4] if run.args.quick else ETAS)}
            at = (max if first == "psnr" else min)(points, key=lambda eta: points[eta][first])
            row = {"level": level, "net": name, "kind": net.config.kind, "best_eta": at,
                   "trained_at": net.config.eta, "residual_std": round(std, 4)}
            row |= {f"best_{number}": round(points[at][number], 2) for number in run.numbers}
            print(", ".join(f"{key} {value}" for key, value in row.items()))
            over = {f"best over that of {other}": (points[at], best[other]) for other in best}
            over |= {f"eta {eta:g} over best": (point, points[at]) for eta, point in points.items()}
            rows.append(row | {key: run.compare("    " + key, *over[key]) for key in over})
            best[name] = points[at]
        for number in run.numbers:
            lines = [common.line(name, points, number, look)
                     for look, (name, points) in zip(common.CYCLE, curves.items())]
            lines.append(("autoencoder", ETAS, [blurry[number]] * len(ETAS), (common.GREY, "")))
            panel = panels.pop(0)
            panel.axvline(std, color=common.GREY, linestyle=":", linewidth=1)
            common.plot(panel, lines, ETAS, xlabel="eta of the sampler's schedule", xscale="log",
                        **common.AXES[number] | {"title": f"Level {level}"})
    run.finish(figure, summary=rows)


if __name__ == "__main__":
    sample.run(main)
