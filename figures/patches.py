"""Patch by patch: what seams look like, how much context cures them, and what it costs.

    python -m figures.patches --out figures

The same file, the same noise, sampled as a whole and in patches of 128 pixels: with more and more
context, and in the paper's groups. Then time and memory as pictures grow.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import hfd
import sample
from figures import common
from hfd import HFDError

PATCH, CONTEXTS, GROUPED = 128, (0, 16, 32, 64, 128), (32, 64)
CHILD = f"""import sys
sys.path.insert(0, {str(Path(sample.__file__).parent)!r})
import sample, train
sample.main(sys.argv[1:])
print(train.peak_memory(sample.pick_device(sys.argv[-1])))"""


def jump(x):
    """Mean difference of neighbours across patch borders, over that of all. x: (1, 3, H, W)."""
    ratios = []
    for d in (2, 3):
        steps = x.diff(dim=d).abs().mean(dim=(0, 1, 5 - d))             # (H - 1,) or (W - 1,)
        ratios.append(steps[PATCH - 1::PATCH].mean() / steps.mean())
    return float(sum(ratios) / 2)


def cost(run, megapixels):
    """{command: seconds and peak memory} of the portrait, enlarged to that size; two steps."""
    image, result = run.images[0], {}
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    shared = ["--model", str(Path(run.args.model).resolve()), "--device", run.args.device]
    with tempfile.TemporaryDirectory() as folder:
        large = image.resize((round(image.width * scale), round(image.height * scale)))
        large.save(Path(folder, "large.png"), compress_level=1)
        for words in ("compress large.png large.hfd", "decompress large.hfd out.png --steps 2"):
            child = subprocess.run([sys.executable, "-c", CHILD, *words.split(), *shared],
                                   cwd=folder, capture_output=True, text=True)
            if child.returncode:
                raise HFDError(f"{words}, {megapixels:g} megapixels: {child.stderr[-200:].strip()}")
            *_, seconds, memory = child.stdout.splitlines()
            parts = [float(part.split()[-1]) for part in seconds.split("seconds: ")[1].split(",")]
            result[words.split()[0]] = {"seconds": sum(parts), "gib": float(memory.split()[2])}
    return result


def main(argv=None):
    """Compare every way with the whole, show the worst and the default, measure the cost."""
    run = common.Run("patches", __doc__, argv, scored=False, level=1, megapixels=[1, 4, 12, 24, 50])
    _, x_hat = run.coded(run.args.level, 0)

    def draw(context, sample_picture=hfd.sample_picture, patch=PATCH):
        """The portrait, sampled so."""
        return sample_picture(run.model.diffusion, x_hat, run.args.level - 1, patch=patch,
                              context=context, seed=run.args.seed)
    whole = draw(0, patch=max(x_hat.shape))
    border = torch.zeros(x_hat.shape[2:], dtype=torch.bool)             # 8 pixels on either side
    for b in range(PATCH, max(x_hat.shape), PATCH):
        border[b - 8:b + 8] = border[:, b - 8:b + 8] = True
    errors, jumps = [], [("whole", [0, CONTEXTS[-1]], [jump(whole)] * 2, (common.GREY, ""))]
    ways = ("together", CONTEXTS, hfd.sample_picture), ("groups", GROUPED, hfd.sample_in_groups)
    for look, (way, contexts, sample_picture) in zip(common.CYCLE, ways):
        points = {}
        for context in contexts[::3] if run.args.quick else contexts:
            def compute():
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
    costs = [run.point(f"{size:g} megapixels", lambda: cost(run, size)) for size in sizes]
    figure, panels = common.axes(3, rows=2, width=3.6, height=3.1)
    common.draw(panels[0], errors, CONTEXTS, xlabel="context (pixels)", ylabel="difference (1/255)",
                title="Against the whole: worst pixel,\nand mean at patch borders", yscale="symlog")
    common.draw(panels[1], jumps, CONTEXTS, xlabel="context (pixels)", ylabel="ratio to elsewhere",
                title="Jump across patch borders")
    for panel, context in zip(panels[2::3], (0, hfd.CONTEXT)):
        difference = ((draw(context) - whole) * 8)[..., 64:320, 64:320]             # grey is none
        panel.imshow(np.asarray(sample.to_image(difference, 256, 256)))
        panel.set(title=f"context {context}: difference, times 8", xticks=[], yticks=[])
    for panel, number, title in ((panels[3], "seconds", "Time (decompress: two steps)"),
                                 (panels[4], "gib", "Peak memory of the process")):
        lines = [(name, sizes, [point[name][number] for point in costs], look)
                 for name, look in zip(("compress", "decompress"), common.CYCLE)]
        common.draw(panel, lines, title=title, xlabel="megapixels", ylabel=number, ylim=(0, None))
    run.finish(figure, whole_jump=round(jump(whole), 4))


if __name__ == "__main__":
    sample.run(main)
