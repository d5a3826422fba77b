"""How many steps does sampling take? Ancestral, DDIM, DPM-Solver++ and rectified flow, 1 to 250.

    python -m figures.steps --images KODAK --middle 256 --flow runs/flow --out figures
"""
import hfd
import sample
from figures import common

STEPS = (1, 2, 4, 6, 8, 16, 32, 250)
ENOUGH = 32     # for dpm, which solves the same equation as DDIM and arrives with fewer steps


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("steps", __doc__, argv, levels=[1, 4], most=250, flow=None)
    steps = [n for n in STEPS if n <= run.args.most][::4 if run.args.quick else 1]
    nets, curves, summary = {name: (name, None) for name in hfd.SAMPLERS}, {}, {}
    if run.args.flow:                   # an Euler step on the flow is a DDIM step on its schedule
        nets["flow"] = "ddim", run.other(run.args.flow).diffusion
    for level in run.args.levels:
        for name, (sampler, net) in nets.items():
            what = f"level {level}, {name}"
            points = curves[level, name] = {
                n: run.sampled(f"{what}, {n} steps", level, net, steps=n, sampler=sampler)
                for n in steps if n <= ENOUGH or name != "dpm"}
            most, over = curves[level, "ddpm"][steps[-1]], {}
            for n, score in points.items():
                over[n] = run.compare(f"{what}, {n} steps, over most of ddpm", score, most)
            enough = [n for n in over if run.distances and over[n]["fd"][0] <= 1.05]
            summary[what] = {"over_most": over, "fewest": min(enough, default=None)}
            print(f"{what}: fewest steps within 5 % of most of ddpm {summary[what]['fewest']}")
    figure, panels = common.axes(len(run.numbers) + 1, width=3.9)
    for panel, number in zip(panels, run.numbers + ["diffusion"]):
        lines = []
        for (level, name), points in curves.items():
            look = *common.CYCLE[[*nets].index(name)], "-" if level == run.args.levels[0] else "--"
            if number != "diffusion" or level == run.args.levels[0]:      # all levels cost the same
                lines.append(common.line(f"{name}, level {level}", points, number, look))
        common.plot(panel, lines, steps, xlabel="steps", xscale="log", **common.AXES[number])
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    sample.run(main)
