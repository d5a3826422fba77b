"""The whole path in one diagram, with what really flows along it: a photo, its latent, the file, the blurry picture, noise, the sample.

    python -m figures.path --out figures
"""
import numpy as np
import torch
from matplotlib import pyplot as plt

import hfd
import sample
from figures import common
from figures.trajectory import Recorder

DETAIL = (230, 380, 486, 572)       # of the portrait


def latent_sheet(k):
    """The 24 first channels of an integer latent (1, M, h, w) as one grey picture, 4 x 6: black 0, white 3 or more steps."""
    rows = k[0, :24].abs().clamp(max=3).reshape(4, 6, *k.shape[2:]).permute(0, 2, 1, 3)             # (4, h, 6, w)
    return rows.reshape(4 * k.shape[2], 6 * k.shape[3]).numpy()


@torch.no_grad()
def main(argv=None):
    """Draw the diagram."""
    run = common.Run("path", __doc__, argv, level=1)
    image, level, model = run.images[0].crop(common.detail(run.images[0], DETAIL)), run.args.level - 1, run.model
    data, _ = sample.compress(image, model, run.args.level, run.args.seed)
    k, _ = sample.decode_latent(sample.parse(data, "path"), model, "path")
    x_hat = model.autoencoder.decode(k, level)
    recorder = Recorder(model.diffusion)
    hfd.sample_picture(recorder, x_hat, level, 20, "ddim", run.args.seed, model.diffusion.config.eta, patch=max(x_hat.shape), context=0)
    picture = lambda t: np.asarray(sample.to_image(t.float(), *image.size))

    plt.rcParams.update(common.STYLE)
    figure = plt.figure(figsize=(12, 2.6), layout="none")
    nodes = [("x, the photo", np.asarray(image)), ("k, the latent: rounded,\n24 of its channels", latent_sheet(k.cpu())), (f"the file:\n{len(data)} bytes", None),
             ("x_hat: right, but blurry", picture(x_hat)), ("z_t, on the way from\npure noise (t = 0.6)", picture(recorder.frames[8][1].clamp(-1, 1))),
             ("x_sample: a picture\nthat it could have been", picture(recorder.frames[-1][2].clamp(-1, 1)))]
    steps = ["hfd.Analysis,\nround", "entropy.encode\n(range coder)", "entropy.decode,\nhfd.Synthesis", "start from noise,\ngiven x_hat",
             "hfd.UNet,\nstep by step"]
    width, gap = 0.104, 0.069
    for i, (name, content) in enumerate(nodes):
        left = 0.012 + i * (width + gap)
        cell = figure.add_axes((left, 0.165, width, 0.62))
        if content is None:
            text = "\n".join(" ".join(f"{byte:02x}" for byte in data[n:n + 8]) for n in range(0, 72, 8)) + "\n..."
            cell.text(0.5, 0.5, text, family="monospace", fontsize=6, ha="center", va="center")
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
            cell.spines[:].set_visible(True)
        else:
            cell.imshow(content, cmap="gray", aspect="auto")
            cell.axis("off")
        figure.text(left + width / 2, 0.13, name, ha="center", va="top", fontsize=8)
        if i < len(steps):
            figure.add_artist(plt.matplotlib.patches.FancyArrowPatch((left + width + 0.004, 0.475), (left + width + gap - 0.004, 0.475),
                                                                     transform=figure.transFigure, arrowstyle="-|>", mutation_scale=10))
            figure.text(left + width + gap / 2, 0.52, steps[i], ha="center", va="bottom", fontsize=6.2)
    stages = (("stage 1, trained for rate + lambda * MSE: all of the bits", 0.012, 3 * (width + gap) + width, "#0072B2"),
              ("stage 2, diffusion: all of the realism", 0.012 + 4 * (width + gap), width * 2 + gap, "#D55E00"))
    for text, left, length, colour in stages:
        figure.add_artist(plt.Line2D((left, left + length), (0.87, 0.87), color=colour, linewidth=2))
        figure.text(left + length / 2, 0.89, text, color=colour, ha="center", va="bottom", fontsize=9)
    run.finish(figure, file_bytes=len(data))


if __name__ == "__main__":
    hfd.run(main)
