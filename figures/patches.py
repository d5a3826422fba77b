"""Patch by patch: what seams look like, how much context cures them, and what it costs.

    python -m figures.patches --out figures

The same file, the same noise, sampled as a whole and in patches of 128 pixels: without context, with more and more of it, and in the paper's groups. At
patch borders, the difference from the whole is shown (in steps of 1/255), and how much the picture jumps there compared with elsewhere (1 is no seam).
Then what it costs, each measured in a process of its own: time and memory as the picture grows, and as more patches are worked on at once.
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

CONTEXTS = (0, 16, 32, 64, 128)
PATCH = 128
BATCHES = (1, 2, 4, 8, 16)
# A process of its own, that says in the end how much memory it took; its last argument is the device.
CHILD = f"import sys; sys.path.insert(0, {str(Path(sample.__file__).parent)!r}); import hfd, sample; sample.main(sys.argv[1:]); " \
    "print(hfd.peak_memory(hfd.pick_device(sys.argv[-1])))"
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
            child = subprocess.run([sys.executable, "-c", CHILD, *words, *shared], cwd=folder, capture_output=True, text=True)
            if child.returncode:
                raise HFDError(f"sample.py {name} failed at {megapixels:g} megapixels: {child.stderr.splitlines()[-1:]}")
            *_, seconds, memory = child.stdout.splitlines()
            result[name] = {"seconds": round(sum(float(part.split()[-1]) for part in seconds.split("seconds: ")[1].split(",")), 2),
                            "peak_memory_gib": float(memory.split()[2])}
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
    by_batch = [run.point(f"batches of {n}, {sizes[0]:g} megapixels", lambda: cost(run, sizes[0], "--patch", str(PATCH), "--batch", str(n))) for n in batches]

    figure, panels = common.axes(4, rows=2, width=3.1, height=3.1)
    errors, jumps = [], [(CONTEXTS[-1], jump(whole), "whole", common.GREY)]
    for way, (colour, marker) in (("together", common.LOOK["HFD"]), ("groups", common.LOOK["autoencoder"])):
        x, points = zip(*((context, results[name]) for grouped, context in WAYS
                          if (name := f"{way}, context {context}") in results and grouped == (way == "groups")))
        for panel, ends, number, text, line in ((panels[0], errors, "worst", f"{way}: worst", "-"),
                                                (panels[0], errors, "mean_at_borders", f"{way}: mean", "--"), (panels[1], jumps, "jump", way, "-")):
            y = [point[number] for point in points]
            panel.plot(x, y, line, color=colour, marker=marker, clip_on=False)
            ends.append((x[-1], y[-1], text, colour))
    panels[0].axhline(1, color=common.GREY, linewidth=0.7)
    panels[0].set_yscale("symlog", linthresh=0.1)
    panels[0].set(title="Against the whole: worst pixel,\nand mean at patch borders", ylabel="difference (1/255)", ylim=(0, None))
    panels[1].axhline(jumps[0][1], color=common.GREY)
    panels[1].set(title="Jump across patch borders\n(grey: what was never cut)", ylabel="ratio to elsewhere")
    for panel in panels[:2]:
        panel.set(xlabel="context (pixels)", xticks=CONTEXTS)
    for panel, (title, name) in zip(panels[2:4], (("no context: seams", "together, context 0"), ("the cure: context 64", "together, context 64"))):
        x = crops.get(name)
        if x is None:               # measured by an earlier run: draw it again
            x = draw(patch=PATCH, context=int(name.split()[-1]))
        difference = ((x - whole) * 127.5 * 8).clamp(-127, 127)[..., 64:320, 64:320]                # enlarged eightfold, grey is none
        panel.imshow(np.asarray(sample.to_image(difference / 127.5, difference.shape[-1], difference.shape[-2])))
        panel.set(title=title + "\n(difference, times 8)", xticks=[], yticks=[])
        panel.grid(False)
    for panel, number, title, unit in ((panels[4], "seconds", f"Time of compress, and of\ndecompress with {COST_STEPS} steps", "seconds"),
                                       (panels[5], "peak_memory_gib", "Peak memory of the process", "GiB")):
        lines = []
        for name, (colour, marker) in (("compress", common.LOOK["autoencoder"]), ("decompress", common.LOOK["HFD"])):
            y = [point[name][number] for point in by_size]
            panel.plot(sizes, y, color=colour, marker=marker)
            lines.append((sizes[-1], y[-1], name, colour))
        panel.set(title=title, xlabel="megapixels", ylabel=unit, xlim=(0, None), ylim=(0, None))
        common.label_ends(panel, lines)
    of = f"{sizes[0]:g} megapixel" + "s" * (sizes[0] != 1) + f", patches of {PATCH}"
    for panel, number, title, unit in ((panels[6], "seconds", f"Time of decompress, {COST_STEPS} steps:\n{of}", "seconds"),
                                       (panels[7], "peak_memory_gib", f"Its peak memory:\n{of}", "GiB")):
        panel.plot(batches, [point["decompress"][number] for point in by_batch], color=common.LOOK["HFD"][0], marker="o", clip_on=False)
        panel.set(title=title, xlabel="patches in a batch", ylabel=unit, xscale="log", ylim=(0, None))
        panel.set_xticks(batches, [str(n) for n in batches])
        panel.minorticks_off()
    common.label_ends(panels[0], errors)
    common.label_ends(panels[1], jumps)
    run.finish(figure, whole_jump=round(jump(whole), 4))


if __name__ == "__main__":
    hfd.run(main)
