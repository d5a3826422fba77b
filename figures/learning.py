"""Does more training help? The Frechet distance, against pixels seen in training.

    python -m figures.learning --images KODAK --others runs/1 runs/2 runs/3 --out figures

The model and the others are one training, kept at several times; their recipes tell which.
"""
import numpy as np

import sample
from figures import common
from hfd import HFDError


def tenfold(seen, values):
    """By how many per cent ten times the training would change a distance, if this goes on: by the
    straight line that fits the logarithms of both best. None for a single point."""
    if len(seen) < 2:
        return None
    slope, _ = np.polyfit(np.log10(seen), np.log10(values), 1)
    return round(float(100 * (10 ** slope - 1)), 1)


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("learning", __doc__, argv, levels=[1, 4], others=[])
    nets, found = {}, {level: {} for level in run.args.levels}
    for folder in [run.args.model, *run.args.others]:
        model = run.other(folder)
        try:
            nets[round(float(model.recipes["denoiser"]["gigapixels"]), 4)] = model.diffusion
        except (LookupError, TypeError, ValueError):
            raise HFDError(f"{folder}: does not say how many gigapixels it has seen") from None
    for level in run.args.levels:
        for seen, net in sorted(nets.items()):
            what = f"level {level}, {seen:g} gigapixels"
            found[level][seen] = run.compare(f"{what}, over the autoencoder",
                                             run.sampled(what, level, net), run.blurry(level))
    outlook = {}
    figure, panels = common.axes(max(len(run.distances), 1))
    for panel, number in zip(panels, run.distances):
        lines = []
        for look, (level, points) in zip(common.CYCLE, found.items()):
            x, (y, low, high) = list(points), zip(*(point[number] for point in points.values()))
            panel.fill_between(x, low, high, color=look[0], alpha=0.12, linewidth=0)
            outlook[f"level {level}, {number}"] = tenfold(x, y)
            lines.append((f"level {level}", x, y, look))
        ticks = {seen: f"{seen:.2g}" for seen in x}
        common.plot(panel, lines, ticks, xlabel="gigapixels seen", xscale="log",
                    title=f"{number}: HFD over the autoencoder")
    print(f"a tenfold of training would change the distance by, in per cent: {outlook}")
    run.finish(figure if run.distances else None, over_autoencoder=found, tenfold=outlook)


if __name__ == "__main__":
    sample.run(main)
