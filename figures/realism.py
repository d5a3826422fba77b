"""The realism knob: x_hat + rho (sample - x_hat) for rho from 0 to 1, and the mean of N samples, against what theory predicts.

    python -m figures.realism --images KODAK --out figures

Let D be the autoencoder's squared error. Were x_hat the true posterior mean E[x | file] and the sampler exact, then the sample would miss x_hat by an
independent copy of the autoencoder's own error, so that the mixture costs (1 + rho^2) D and the mean of N samples (1 + 1/N) D. (Blau & Michaeli 2019;
Freirich et al. 2021.) An x_hat that misses the mean by b^2 pays 2 rho b^2 less. What lies below the theory's line did not dare to sample all of the detail.
"""
import numpy as np
import torch

import hfd
import sample
from figures import common

RHO = tuple(i / 10 for i in range(11))
DRAWS = (1, 2, 4, 8)


def knob(run, level, draws):
    """The `code` of common.Run.measure: every rho with the first sample, and means of the first N samples."""
    def code(i, image):
        """Picture i's file, and every mixture and mean that is measured."""
        data, x_hat = run.coded(level, i)
        samples = [hfd.sample_picture(run.model.diffusion, x_hat, level - 1, run.args.steps, seed=run.args.seed + 1000 * n + i,
                                      eta=run.args.eta) for n in range(max(draws))]
        shown = {f"rho {rho:g}": torch.lerp(x_hat, samples[0], rho) for rho in RHO}
        shown |= {f"mean of {n}": torch.stack(samples[:n]).mean(dim=0) for n in draws}
        return data, {name: (sample.to_image(x, *image.size), {}) for name, x in shown.items()}
    return code


def main(argv=None):
    """Measure, compare with the predictions, draw."""
    run = common.Run("realism", __doc__, argv, levels=[1, 4], steps=hfd.STEPS, eta=None)
    draws = DRAWS[:2] if run.args.quick else DRAWS
    scores = {level: run.measure(f"level {level}", knob(run, level, draws)) for level in run.args.levels}
    error = lambda score: np.mean([10 ** (-psnr / 10) for psnr in score["psnr_each"]])      # mean squared error, of a range of 1
    summary = {}
    for level, score in scores.items():
        ratio = {name: error(score[name]) / error(score["rho 0"]) for name in score}
        summary[level] = {name: round(value, 4) for name, value in ratio.items()}
        print(f"level {level}: squared error over the autoencoder's: rho 1 {ratio['rho 1']:.3f} (theory 2), " +
              ", ".join(f"mean of {n} {ratio[f'mean of {n}']:.3f} (theory {1 + 1 / n:.3f})" for n in draws))
    figure, panels = common.axes(len(run.numbers) + 1, width=3.9)
    for panel, number in zip(panels, run.numbers):
        lines = {}
        for look, (level, score) in zip(common.CYCLE, scores.items()):
            lines[f"level {level}"] = (*look, "-", {rho: score[f"rho {rho:g}"] for rho in RHO})
            if number == "psnr":
                theory = {rho: {"psnr": score["rho 0"]["psnr"] - 10 * np.log10(1 + rho ** 2)} for rho in RHO}
                lines[f"theory, level {level}"] = look[0], "", ":", theory
        common.curves(panel, run, number, lines, "rho", RHO[::2], "linear")
    ends = [(draws[-1], 1 + 1 / draws[-1], "theory, 1 + 1/N", common.GREY)]
    panels[-1].plot(draws, [1 + 1 / n for n in draws], color=common.GREY, linestyle=":")
    for (colour, marker), level in zip(common.CYCLE, scores):
        y = [summary[level][f"mean of {n}"] for n in draws]
        panels[-1].plot(draws, y, color=colour, marker=marker)
        ends.append((draws[-1], y[-1], f"level {level}", colour))
    panels[-1].set(title="Mean of N samples: back to x_hat", xlabel="N", ylabel="squared error / the autoencoder's", xscale="log")
    panels[-1].set_xticks(draws, [str(n) for n in draws])
    panels[-1].minorticks_off()
    common.label_ends(panels[-1], ends)
    run.finish(figure, squared_error_over_autoencoder=summary)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    hfd.run(main)
