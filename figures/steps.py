"""How many steps does sampling take? Ancestral DDPM, DDIM, DPM-Solver++ and, with --flow, rectified flow, from 1 to 250 steps.

    python -m figures.steps --images KODAK --middle 256 --flow runs/flow.pt --out figures

The paper draws 250 ancestral steps, and finds that rectified flow is better with few steps and diffusion with many. A step is one evaluation
of the network for every pixel, so steps are the cost of decoding, whatever the sampler. (With --middle 256, a sixth of Kodak's pixels, this
takes 70 minutes on two CPU cores.)
"""
import hfd
from figures import common, metrics

STEPS = (1, 2, 4, 6, 8, 16, 32, 250)
ENOUGH = 32                 # steps for dpm: it solves the same equation as DDIM, to second order, and arrives where DDIM does with many more


def flags(parser):
    """The flags of this script alone."""
    parser.add_argument("--most", type=int, default=250, help="no more steps than this")
    parser.add_argument("--flow", metavar="FILE", help="a checkpoint with the same autoencoder, trained with --objective flow")


def main(argv=None):
    """Sample with every sampler in every number of steps, print, draw."""
    run = common.Run("steps", __doc__, argv, flags, levels=[1, 4], eta=None)
    steps = [n for n in STEPS if n <= run.args.most][::4 if run.args.quick else 1]
    nets = {name: (name, run.model.diffusion) for name in sorted(hfd.SAMPLERS)}
    if run.args.flow:           # an Euler step on the flow is a DDIM step on its schedule
        nets["flow"] = "ddim", run.other(run.args.flow)
    curves = {(level, name): {n: run.sampled(f"level {level}, {name}, {n} steps", level, net, steps=n, sampler=sampler, eta=run.args.eta)
                              for n in steps if n <= ENOUGH or name != "dpm"} for level in run.args.levels for name, (sampler, net) in nets.items()}
    for (level, name), points in curves.items():
        for n, point in points.items():
            print(f"level {level}, {name:5} {n:4} steps: " + ", ".join(f"{number} {point[number]:.2f}" for number in run.numbers) +
                  f", {point['seconds']['diffusion']:.2f} s")
    # The paper draws many ancestral steps. Which is the cheapest way to within 5 % of their Frechet distance?
    cheapest = {level: {name: next((n for n, point in curves[level, name].items() if point["fd"] <= 1.05 * curves[level, "ddpm"][steps[-1]]["fd"]), None)
                        for name in nets} for level in run.args.levels if run.features}
    summary = {"fewest_steps_within_5_percent": cheapest, "fd_ratios": {}}
    for level, few in cheapest.items():
        most, default = curves[level, "ddpm"][steps[-1]], curves[level, "dpm"].get(hfd.STEPS)
        over = {f"{name} over ddpm with {steps[-1]}": {n: (point, most) for n, point in curves[level, name].items()} for name in nets}
        if default:
            over[f"dpm over dpm with {hfd.STEPS}, the default"] = {n: (point, default) for n, point in curves[level, "dpm"].items()}
        if run.args.flow:       # the paper's comparison
            over |= {f"flow over {name}": {n: (curves[level, "flow"][n], point) for n, point in curves[level, name].items()} for name in hfd.SAMPLERS}
        ratios = summary["fd_ratios"][level] = {name: {n: metrics.fd_ratio(*pair) for n, pair in pairs.items()} for name, pairs in over.items()}
        for name, each in ratios.items():
            print(f"level {level}, Frechet distance of {name}: " + ", ".join("{} steps {:.2f} [{:.2f}, {:.2f}]".format(n, *ratio) for n, ratio in each.items()))
        print(f"level {level}, fewest steps within 5 % of the Frechet distance of ddpm with {steps[-1]}: " + ", ".join(f"{name} {n}" for name, n in few.items()))
    figure, panels = common.axes(len(run.numbers) + 1, width=3.9)
    for panel, number in zip(panels, run.numbers + ["seconds"]):
        lines = {}
        for (level, name), points in curves.items():
            style = *common.CYCLE[list(nets).index(name)], "-" if level == run.args.levels[0] else "--"
            if number != "seconds":
                lines[f"{name}, level {level}"] = *style, points
            elif level == run.args.levels[-1]:              # all levels cost the same
                lines[name] = *style, points
        common.curves(panel, run, number, lines, "steps", steps)
    run.finish(figure, **summary)


if __name__ == "__main__":
    hfd.run(main)
