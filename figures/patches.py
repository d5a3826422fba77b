"""Patch by patch: what seams look like, how much context cures them, and what memory it takes.

    python -m figures.patches --out figures

The same file, sampled as a whole and in patches of 128 pixels: together, from the same noise, with
more and more context; and in the paper's groups, each with noise of its own. Then the peak memory,
as pictures grow.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import hfd
import sample
from figures import common
from hfd import HFDError

PATCH, CONTEXTS, GROUPED = 128, (0, 16, 32, 64, 128), (32, 64)
CHILD = """import sys, torch, hfd, sample, train
side, model = int(sys.argv[1]), hfd.load_model(sys.argv[2], sample.pick_device(sys.argv[3]))
hfd.sample_picture(model.diffusion, torch.zeros(1, 3, side, side, device=model.device), 0, steps=2)
print(train.peak_memory(model.device))"""


def jump(x):
    """Mean difference of neighbours across patch borders, over that of all. x: (1, 3, H, W)."""
    ratios = []
    for d in (2, 3):
        steps = x.diff(dim=d).abs().mean(dim=(0, 1, 5 - d))             # (H - 1,) or (W - 1,)
        ratios.append(steps[PATCH - 1::PATCH].mean() / steps.mean())
    return float(sum(ratios) / 2)


def memory(run, megapixels):
    """GiB at the peak of a process that samples a picture of that size, in two steps."""
    side = round(1000 * megapixels ** 0.5 / hfd.CELL) * hfd.CELL
    words = [side, Path(run.args.model).resolve(), run.args.device]
    child = subprocess.run([sys.executable, "-c", CHILD, *map(str, words)], text=True,
                           cwd=Path(sample.__file__).parent, capture_output=True)
    if child.returncode:
        raise HFDError(f"{megapixels:g} megapixels: {child.stderr[-200:].strip()}")
    return {"gib": float(child.stdout.split("peak memory ")[1].split()[0])}


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("patches", __doc__, argv, scored=False, level=1, megapixels=[1, 4, 12, 24, 50])
    _, x_hat = run.coded(run.args.level, 0)

    def draw(context, sample_picture=hfd.sample_picture, patch=PATCH):
        """One sample, in patches with that context."""
        return sample_picture(run.model.diffusion, x_hat, run.args.level - 1, patch=patch,
                              context=context, seed=run.args.seed)
    whole = draw(0, patch=max(x_hat.shape))
    border = torch.zeros(x_hat.shape[2:], dtype=torch.bool)             # 8 pixels on either side
    for d, side in enumerate(border.shape):
        for b in range(PATCH, side, PATCH):
            border.narrow(d, b - 8, 16).fill_(True)
    errors, jumps = [], [("whole", [0, CONTEXTS[-1]], [jump(whole)] * 2, (common.GREY, ""))]
    ways = ("together", CONTEXTS, hfd.sample_picture), ("groups", GROUPED, hfd.sample_in_groups)
    for look, (way, contexts, sample_picture) in zip(common.CYCLE, ways):
        points = {}
        for context in contexts[::3] if run.args.quick else contexts:
            def compute():
                """How far the sample is off the whole picture's, and how it jumps at borders."""
                x = draw(context, sample_picture)
                error = (x - whole).abs().amax(dim=1)[0].cpu() * 127.5              # (H, W)
                return {"worst": round(float(error.max()), 4), "jump": round(jump(x), 4),
                        "mean_at_borders": round(float(error[border].mean()), 4)}
            points[context] = run.point(f"{way}, context {context}", compute)
            print(f"{way}, context {context}: {points[context]} (whole: jump {jump(whole):.3f})")
        errors += [common.line(f"{way}: worst", points, "worst", look),
                   common.line(f"{way}: mean", points, "mean_at_borders", (*look, "--"))]
        jumps.append(common.line(way, points, "jump", look))
    sizes = run.args.megapixels[:1] if run.args.quick else run.args.megapixels
    peaks = {n: run.point(f"{n:g} megapixels", lambda: memory(run, n)) for n in sizes}
    figure, panels = common.axes(3, rows=2, width=3.6, height=3.1)
    common.plot(panels[0], errors, CONTEXTS, xlabel="context (pixels)", ylabel="difference (1/255)",
                title="Against the whole: worst pixel,\nand mean at patch borders", yscale="symlog")
    common.plot(panels[1], jumps, CONTEXTS, xlabel="context (pixels)", ylabel="over that of all",
                title="Jump across patch borders")
    common.plot(panels[2], [common.line("sampling", peaks, "gib", common.CYCLE[0])],
                title="Peak memory", xlabel="megapixels", ylabel="GiB", ylim=(0, None))
    shown = {"sampled as a whole": whole}                               # a difference of 0 is grey
    shown |= {f"context {n}: difference, times 8": 8 * (draw(n) - whole) for n in (0, hfd.CONTEXT)}
    for panel, (title, x) in zip(panels[3:], shown.items()):
        panel.imshow(np.asarray(sample.to_image(x[..., 64:320, 64:320], 256, 256)))
        panel.set(title=title, xticks=[], yticks=[])
    run.finish(figure, whole_jump=round(jump(whole), 4))


if __name__ == "__main__":
    sample.run(main)
