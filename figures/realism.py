"""The realism knob x_hat + rho (sample - x_hat), and means of N samples, against theory (dotted).

    python -m figures.realism --images KODAK --out figures

Let D be the autoencoder's squared error. Were x_hat the true posterior mean E[x | file] and the
sampler exact, then the sample would miss x_hat by an independent copy of its own error, so the
mixture would cost (1 + rho^2) D and the mean of N samples (1 + 1/N) D (Blau & Michaeli 2019;
Freirich et al. 2021). An x_hat that misses the mean by b^2 pays 2 rho b^2 less.
"""
import numpy as np
import torch

import sample
from figures import common

RHO = [n / 10 for n in range(11)]


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("realism", __doc__, argv, levels=[1, 4])
    draws, summary = (1, 2) if run.args.quick else (1, 2, 4, 8), {}
    figure, panels = common.axes(len(run.numbers) + 1, width=3.9)
    lines = {number: [] for number in run.numbers}
    means = [("theory, 1 + 1/N", draws, [1 + 1 / n for n in draws], (common.GREY, "", ":"))]
    for look, level in zip(common.CYCLE, run.args.levels):
        def knob(i, x_hat):
            """Every rho with the first sample, and means of the first N: as Run.drawn needs it."""
            samples = [run.sample(level, i, seed=1000 * n) for n in range(draws[-1])]
            mixed = {f"rho {rho:g}": torch.lerp(x_hat, samples[0], rho) for rho in RHO}
            return mixed | {f"mean of {n}": torch.stack(samples[:n]).mean(dim=0) for n in draws}
        scores = run.drawn(f"level {level}", level, knob)
        found = summary[level] = {name: round(score["mse"] / scores["rho 0"]["mse"], 4)
                                  for name, score in scores.items()}
        print(f"level {level}: squared error over D (in theory 1 + rho^2 and 1 + 1/N): {found}")
        for name, score in scores.items():
            run.compare(f"level {level}, {name} over rho 0", score, scores["rho 0"])
        for number in run.numbers:
            points = {rho: scores[f"rho {rho:g}"] for rho in RHO}
            lines[number].append(common.line(f"level {level}", points, number, look))
        theory = [scores["rho 0"]["psnr"] - 10 * np.log10(1 + rho ** 2) for rho in RHO]
        lines["psnr"].append((f"theory, level {level}", RHO, theory, (look[0], "", ":")))
        means.append((f"level {level}", draws, [found[f"mean of {n}"] for n in draws], look))
    for panel, number in zip(panels, run.numbers):
        common.plot(panel, lines[number], RHO[::2], xlabel="rho", **common.AXES[number])
    common.plot(panels[-1], means, draws, title="Mean of N samples: back to x_hat", xlabel="N",
                ylabel="squared error / the autoencoder's", xscale="log")
    run.finish(figure, squared_error_over_autoencoder=summary)


if __name__ == "__main__":
    sample.run(main)
