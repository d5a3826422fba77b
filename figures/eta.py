"""Which noise schedule is best? One net, which sees log SNR, sampled under every eta; and nets that were trained under others.

    python -m figures.eta --images KODAK --out figures

The paper shifts the cosine schedule by eta = 0.5 and does not vary it. At t = 1/2 noise and signal stand at sigma / alpha = eta. Noise far above
the residual x - x_hat hides everything but x_hat, noise far below it leaves nothing to decide: so the best eta should lie near the residual's
standard deviation (dotted), and fall as the rate rises. (eta = 0 is left out: without any noise there is nothing to sample.)
"""
import hfd
from figures import common

ETAS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def flags(parser):
    """The flags of this script alone."""
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 4], help="quality levels of the model")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--sampler", choices=sorted(hfd.SAMPLERS), default="dpm", help="which")
    parser.add_argument("--retrained", metavar="FILE", nargs="+", default=[], help="more checkpoints with the same autoencoder, trained at other eta")


def main(argv=None):
    """Sample with every net under every eta, print the best, draw."""
    run = common.Run("eta", __doc__, argv, flags)
    etas = ETAS[::5] if run.args.quick else ETAS
    nets = [run.model.diffusion] + [hfd.load_model(path, run.device).diffusion for path in run.args.retrained]
    curves = {(level, net.config.eta): [
        run.sampled(f"level {level}, trained at {net.config.eta:g}, sampled at {eta:g}", level, net, eta=eta, steps=run.args.steps,
                    sampler=run.args.sampler) for eta in etas] for level in run.args.levels for net in nets}
    numbers = ["fd", "psnr"] if run.features else ["psnr"]
    std = {level: run.model.diffusion.residual_std[level - 1].square().mean().sqrt().item() for level in run.args.levels}
    summary = []
    for (level, trained), points in curves.items():
        best = {n: etas[(min if n == "fd" else max)(range(len(etas)), key=lambda i: points[i][n])] for n in numbers}
        summary.append({"level": level, "trained_at": trained, "residual_std": round(std[level], 4), "best_eta": best})
        print(f"level {level}, trained at eta {trained:g}: residual {std[level]:.3f}, best eta " + ", ".join(f"{e:g} for {n}" for n, e in best.items()))
    figure, panels = common.axes(len(numbers))
    for panel, number in zip(panels, numbers):
        ends = []
        for (level, trained), points in curves.items():
            colour, marker = common.CYCLE[run.args.levels.index(level)]
            line = "-" if trained == nets[0].config.eta else (0, (1 + 8 * trained, 1.5))
            panel.plot(etas, [point[number] for point in points], color=colour, marker=marker, linestyle=line)
            panel.axvline(std[level], color=colour, linestyle=":", linewidth=1)
            ends.append((etas[-1], points[-1][number], f"level {level}, trained at {trained:g}", colour))
        if number == "fd":
            for i, level in enumerate(run.args.levels):
                y = run.blurry(level)["fd"]
                panel.axhline(y, color=common.CYCLE[i][0], linewidth=0.7)
                ends.append((etas[-1], y, f"level {level}, autoencoder", common.CYCLE[i][0]))
        common.dress(panel, run, number, "eta of the sampler's schedule", [eta for eta in etas if eta in (0.025, 0.05, 0.1, 0.2, 0.5, 1)], ends)
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    hfd.run(main)
