"""Patch by patch: what seams look like, how much context cures them, and what it costs.

    python -m figures.patches --out figures

The same file, the same noise, sampled as a whole and in patches of 128 pixels: without context, with more and more of it, and in the paper's groups. At
patch borders, the difference from the whole is shown (in steps of 1/255), and how much the picture jumps there compared with elsewhere (1 is no seam).
Then what it costs, each measured in a process of its own: time and memory as the picture grows, and as more patches are worked on at once.
"""
import os
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

CONTEXTS = (0, 8, 16, 32, 64, 128)
PATCH = 128
BATCHES = (1, 2, 4, 8, 16)
COST_STEPS = 2              # of the runs that measure cost; other numbers of steps take time in proportion
WAYS = [(False, context) for context in CONTEXTS] + [(True, 32), (True, 64)]       # (grouped, context)


def flags(parser):
    """The flags of this script alone."""
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 4, 12, 24, 50], help="sizes to measure time and memory at")


def jump(x):
    """Mean difference of horizontal and vertical neighbours across patch borders, over that of all neighbours. x: (1, 3, H, W)."""
    ratios = []
    for d in (-1, -2):
        steps = x.diff(dim=d).abs().mean(dim=tuple(i for i in range(4) if i != d % 4))              # (W - 1,) or (H - 1,)
        ratios.append(steps[PATCH - 1::PATCH].mean() / steps.mean())
    return float(sum(ratios) / 2)


def cost(run, megapixels, *flags):
    """Seconds and peak memory of compressing the first picture, enlarged to that size, and of decoding it with these flags."""
    image, result = run.images[0], {}
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    shared = ["--model", str(Path(run.args.model).resolve()), "--device", run.args.device]
    with tempfile.TemporaryDirectory() as folder:
        image.resize((round(image.width * scale), round(image.height * scale))).save(Path(folder, "large.png"), compress_level=1)
        for name, words in (("compress", ["compress", "large.png", "large.hfd", "--quality", str(run.args.level)]),
                            ("decompress", ["decompress", "large.hfd", "out.png", "--steps", str(COST_STEPS), *flags])):
            with open(Path(folder, "printed"), "w+") as printed:
                child = subprocess.Popen([sys.executable, sample.__file__, *words, *shared], cwd=folder, stdout=printed, stderr=subprocess.DEVNULL)
                _, status, usage = os.wait4(child.pid, 0)               # which also tells what this one process has used
                child.returncode = os.waitstatus_to_exitcode(status)
                if child.returncode:
                    raise HFDError(f"sample.py {name} failed at {megapixels:g} megapixels")
                printed.seek(0)
                seconds = [float(part.split()[-1]) for part in printed.read().split("seconds: ")[1].split(",")]
            result[name] = {"seconds": round(sum(seconds), 2), "peak_memory_gib": round(usage.ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20), 3)}
    return result


def main(argv=None):
    """Compare every way with the whole, show the worst and the default, time the default."""
    run = common.Run("patches", __doc__, argv, flags, level=1, steps=hfd.STEPS, eta=None)
    args, image = run.args, run.images[0]
    _, x_hat = run.coded(args.level, 0)
    draw = lambda **how: hfd.sample_picture(run.model.diffusion, x_hat, args.level - 1, args.steps, seed=args.seed, eta=args.eta, **how)
    whole = draw(patch=max(x_hat.shape), context=0)
    border = torch.zeros(x_hat.shape[-2:], dtype=torch.bool)                                        # 8 pixels on either side
    for b in range(PATCH, max(x_hat.shape), PATCH):
        border[max(b - 8, 0):b + 8] = border[:, max(b - 8, 0):b + 8] = True
    results, crops = {}, {}
    for grouped, context in WAYS[::3] if args.quick else WAYS:
        name = ("groups" if grouped else "together") + f", context {context}"

        def compute():
            """Sample this way; compare with the whole."""
            x, seconds = common.timed(lambda: draw(patch=PATCH, context=context, grouped=grouped))
            crops[name] = x
            error = (x - whole).abs().amax(dim=1)[0] * 127.5                                        # (H, W)
            return {"worst": round(float(error.max()), 4), "mean_at_borders": round(float(error[border].mean()), 4),
                    "jump": round(jump(x), 4), "seconds": round(seconds, 3)}
        results[name] = run.point(name, compute)
        print(f"{name:22}: worst {results[name]['worst']:7.3f} / 255, jump {results[name]['jump']:.3f} (whole: {jump(whole):.3f})")
    sizes, batches = sorted(args.megapixels)[:1 if args.quick else None], BATCHES[:2 if args.quick else None]
    by_size = [run.point(f"{mp:g} megapixels", lambda: cost(run, mp)) for mp in sizes]
    by_batch = [run.point(f"batches of {n}", lambda: cost(run, sizes[0], "--patch", str(PATCH), "--batch", str(n))) for n in batches]

    figure, panels = common.axes(5, width=3.6, height=3.4)
    together = [(c, results[n]) for c in CONTEXTS if (n := f"together, context {c}") in results]
    colour, marker = common.LOOK["HFD"]
    panels[0].plot([c for c, _ in together], [max(r["worst"], 1e-3) for _, r in together], color=colour, marker=marker)
    for name, r in results.items():
        if name.startswith("groups"):
            panels[0].plot(int(name.split()[-1]), r["worst"], color=common.LOOK["autoencoder"][0], marker="s", linestyle="")
            panels[0].annotate("groups", (int(name.split()[-1]), r["worst"]), (4, 4), textcoords="offset points", fontsize=8)
    panels[0].axhline(1, color=common.GREY, linewidth=0.7)
    panels[0].set(yscale="log", title="Worst pixel against the whole", xlabel="context (pixels)", ylabel="difference (1/255)")
    for panel, (title, name) in zip(panels[1:3], (("no context: seams", "together, context 0"), ("the cure: context 64", "together, context 64"))):
        x = crops.get(name)
        if x is None:               # measured by an earlier run: draw it again
            x = draw(patch=PATCH, context=int(name.split()[-1]))
        difference = ((x - whole) * 127.5 * 8).clamp(-127, 127)[..., 64:320, 64:320]                # enlarged eightfold, grey is none
        panel.imshow(np.asarray(sample.to_image(difference / 127.5, difference.shape[-1], difference.shape[-2])))
        panel.set(title=title + "\n(difference from the whole, times 8)", xticks=[], yticks=[])
        panel.grid(False)
    for panel, x, points, what in ((panels[3], sizes, by_size, ("compress", "decompress")), (panels[4], batches, by_batch, ("decompress",))):
        for name, colour, marker in zip(what[::-1], ("HFD", "autoencoder"), "os"):
            for number, line in (("seconds", "-"), ("peak_memory_gib", "--")):
                panel.plot(x, [point[name][number] for point in points], color=common.LOOK[colour][0], marker=marker, linestyle=line,
                           label=f"{name}, {'s' if number == 'seconds' else 'GiB'}")
        panel.legend(frameon=False, fontsize=7)
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(x, [f"{n:g}" for n in x])
        panel.minorticks_off()
    panels[3].set(title=f"Time and memory, {COST_STEPS} steps", xlabel="megapixels")
    panels[4].set(title=f"{sizes[0]:g} megapixels, patches of {PATCH}", xlabel="patches in a batch")
    run.finish(figure, whole_jump=round(jump(whole), 4))


if __name__ == "__main__":
    hfd.run(main)
