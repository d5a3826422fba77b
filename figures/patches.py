"""Patch by patch: what seams look like, how much context cures them, and what it costs.

    python -m figures.patches --out figures

The same file, the same noise, sampled as a whole and in patches of 128 pixels: without context, with more and more of it, and in the paper's groups. At
patch borders, the difference from the whole is shown (in steps of 1/255), and how much the picture jumps there compared with elsewhere (1 is no seam).
Then time and memory of decoding as the picture grows, at the default patch and context.
"""
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import hfd
import sample
from figures import common

CONTEXTS = (0, 8, 16, 32, 64, 128)
PATCH = 128
WAYS = [(False, context) for context in CONTEXTS] + [(True, 32), (True, 64)]       # (grouped, context)


def flags(parser):
    """The flags of this script alone."""
    parser.add_argument("--level", type=int, default=1, help="quality level of the model")
    parser.add_argument("--steps", type=int, default=sample.STEPS, help="denoising steps")
    parser.add_argument("--eta", type=float, default=sample.ETA, help="of the sampler's schedule")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.25, 1, 4], help="sizes to measure time and memory at")


def jump(x):
    """Mean difference of horizontal and vertical neighbours across patch borders, over that of all neighbours. x: (1, 3, H, W)."""
    ratios = []
    for d in (-1, -2):
        steps = x.diff(dim=d).abs().mean(dim=tuple(i for i in range(4) if i != d % 4))              # (W - 1,) or (H - 1,)
        ratios.append(steps[PATCH - 1::PATCH].mean() / steps.mean())
    return float(sum(ratios) / 2)


def decoding_cost(run, megapixels):
    """Seconds of sampling and the peak memory of a process of its own that decodes the first picture, enlarged to that size.

    The operating system tells the most that any finished child has held, so sizes must be measured in rising order."""
    image = run.images[0]
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    data, _ = sample.compress(image.resize((round(image.width * scale), round(image.height * scale))), run.model, run.args.level)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "large.hfd").write_bytes(data)
        command = [sys.executable, str(Path(sample.__file__)), "decompress", "large.hfd", "large.png", "--model", str(Path(run.args.model).resolve()),
                   "--steps", str(run.args.steps), "--device", run.args.device]
        printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {"seconds": float(printed.split("diffusion ")[1]), "peak_memory_gib": round(kilobytes / 2 ** 20, 3)}


def main(argv=None):
    """Compare every way with the whole, show the worst and the default, time the default."""
    run = common.Run("patches", __doc__, argv, flags)
    args, image = run.args, run.images[0]
    _, x_hat = run.coded(args.level, 0)
    draw = lambda **how: hfd.sample_picture(run.model.diffusion, x_hat, args.level - 1, args.steps, sample.SAMPLER, args.seed, args.eta, **how)
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
    cost = {mp: run.point(f"{mp:g} megapixels", lambda: decoding_cost(run, mp)) for mp in sorted(args.megapixels)[:1 if args.quick else None]}

    figure, panels = common.axes(4, width=3.6, height=3.4)
    together = [(c, results[n]) for c in CONTEXTS if (n := f"together, context {c}") in results]
    colour, marker = common.LOOK["HFD"]
    panels[0].plot([c for c, _ in together], [max(r["worst"], 1e-3) for _, r in together], color=colour, marker=marker)
    for name, r in results.items():
        if name.startswith("groups"):
            panels[0].plot(int(name.split()[-1]), r["worst"], color=common.LOOK["autoencoder"][0], marker="s", linestyle="")
            panels[0].annotate("groups", (int(name.split()[-1]), r["worst"]), (4, 4), textcoords="offset points", fontsize=8)
    panels[0].axhline(1, color=common.GREY, linewidth=0.7)
    panels[0].set(yscale="log", title="Worst pixel against the whole", xlabel="context (pixels)", ylabel="difference (1/255)")
    for panel, (title, name) in zip(panels[1:3], (("no context: seams", "together, context 0"), ("the cure: context 32", "together, context 32"))):
        x = crops.get(name)
        if x is None:               # measured by an earlier run: draw it again
            x = draw(patch=PATCH, context=int(name.split()[-1]))
        difference = ((x - whole) * 127.5 * 8).clamp(-127, 127)[..., 64:320, 64:320]                # enlarged eightfold, grey is none
        panel.imshow(np.asarray(sample.to_image(difference / 127.5, difference.shape[-1], difference.shape[-2])))
        panel.set(title=title + "\n(difference from the whole, times 8)", xticks=[], yticks=[])
        panel.grid(False)
    sizes = list(cost)
    panels[3].plot(sizes, [c["seconds"] for c in cost.values()], color=colour, marker=marker, label="seconds")
    panels[3].plot(sizes, [c["peak_memory_gib"] for c in cost.values()], color=common.LOOK["autoencoder"][0], marker="s", label="GiB, whole process")
    panels[3].legend(frameon=False)
    panels[3].set(xscale="log", yscale="log", title=f"Decoding, {args.steps} steps", xlabel="megapixels")
    run.finish(figure, whole_jump=round(jump(whole), 4))


if __name__ == "__main__":
    hfd.run(main)
