"""The whole path in one diagram, with what really flows along it: photo, latent, file, sample.

    python -m figures.path --out figures
"""
import numpy as np

import sample
from figures import common
from figures.trajectory import recorded

DETAIL = (230, 380, 486, 572)           # of the portrait
ARROWS = ("hfd.Analysis,\nround", "entropy.encode\n(range coder)", "entropy.decode,\nhfd.Synthesis",
          "start from noise,\ngiven x_hat", "hfd.UNet,\nstep by step", "")


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("path", __doc__, argv, scored=False, level=1)
    image = run.images[0].crop(DETAIL)
    run.images = [image]
    data, x_hat = run.coded(run.args.level, 0)
    k = run.model.autoencoder.encode(sample.to_tensor(image, run.device), run.args.level - 1)
    frames = recorded(run.model.diffusion, x_hat, run.args.level - 1, run.args.seed)
    latent = k[0, :24].abs().clamp(max=3).reshape(4, 6, *k.shape[2:]).permute(0, 2, 1, 3)
    latent = latent.reshape(4 * k.shape[2], -1).cpu().numpy()           # black 0, white 3 or more
    blurry, noisy, drawn = (sample.to_image(t, *image.size)
                            for t in (x_hat, frames[8][1], frames[-1][2]))
    nodes = {"x, the photo": image, "k, the latent: rounded,\n24 of its channels": latent,
             f"the file:\n{len(data)} bytes": None, "x_hat: right, but blurry": blurry,
             "z_t, on the way from\npure noise (t = 0.6)": noisy,
             "x_sample: a picture\nthat it could have been": drawn}
    figure, cells = common.axes(len(nodes), width=2, height=2.6)
    figure.get_layout_engine().set(rect=(0, 0, 0.98, 0.87))
    for cell, (name, content), arrow in zip(cells, nodes.items(), ARROWS):
        if content is None:
            text = "\n".join(data[n:n + 8].hex(" ") for n in range(0, 72, 8)) + "\n..."
            cell.text(0.5, 0.5, text, family="monospace", fontsize=6, ha="center", va="center")
        else:
            cell.imshow(np.asarray(content), cmap="gray", vmin=0, vmax=3, aspect="auto")
        cell.set(xticks=[], yticks=[], xlabel=name)
        cell.grid(False)
        cell.text(1.33, 0.56, arrow, fontsize=6.2, ha="center", transform=cell.transAxes)
        if arrow:
            cell.annotate("", (1.61, 0.5), (1.04, 0.5), xycoords="axes fraction",
                          arrowprops={"arrowstyle": "-|>"})
    figure.text(0.1, 0.89, "stage 1, trained for rate + lambda * MSE: all of the bits",
                color=common.LOOK["autoencoder"][0])
    figure.text(0.7, 0.89, "stage 2, diffusion: all of the realism", color=common.LOOK["HFD"][0])
    run.finish(figure, file_bytes=len(data))


if __name__ == "__main__":
    sample.run(main)
