"""Where is the missing energy? Power spectra of what decoders make, relative to the originals'.

    python -m figures.spectrum --images KODAK --out figures

Beside them, coloured grain on flat ground.
"""
import numpy as np
import torch.nn.functional as F

import hfd
import sample
from figures import codecs, common
from hfd import HFDError

SIDE, BINS = 256, 64
SHOWN = {"1/8": BINS // 4, "1/4": BINS // 2, "1/2": BINS - 1}           # cycles per pixel


def radial_power(image):
    """(BINS,) mean power of the middle of the grey picture by spatial frequency, in equal bins from
    0 to 1/2 cycles per pixel. Sides must be at least 2 BINS, or bins are empty. A Hann window fades
    the borders: the Fourier transform takes pictures for periodic, and the jump there for
    detail."""
    side = min(SIDE, *image.size)
    grey = np.asarray(common.around_centre(image, side).convert("L"), float)
    window = np.hanning(side)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window * window[:, None])) ** 2
    radius = np.hypot(np.fft.fftfreq(side), np.fft.fftfreq(side)[:, None])          # (side, side)
    which = np.minimum((radius * 2 * BINS).astype(int), BINS).ravel()   # BINS: corners, left out
    return np.bincount(which, power.ravel())[:BINS] / np.bincount(which)[:BINS]


def grain(image, original):
    """The rms of fine colour in `image`, in steps of 1/255, over the twentieth of all 16-pixel
    squares where `original` is flattest: a sky, say."""
    whole = (0, 0, image.width // 16 * 16, image.height // 16 * 16)
    fine = []
    for x in (image, original):
        planes = hfd.to_planes(127.5 * sample.to_tensor(x.crop(whole), "cpu"))[0]   # (12, H/2, W/2)
        energy = F.avg_pool2d(planes.square(), 8).reshape(3, 4, -1)     # (colours, Haar, squares)
        fine.append(energy[:, 1:].sum(dim=1))               # all but the means
    flattest = fine[1].sum(dim=0).argsort()[:max(fine[1].shape[1] // 20, 1)]
    return (fine[0][1:, flattest].mean() / 3).sqrt().item()             # without grey


def spectra(run, level):
    """{kind: {name: mean over all pictures}} of power, grain (1/255) and bits per pixel."""
    found = {"power": {}, "grain": {}, "bpp": {}}
    for i, image in enumerate(run.images):
        data, x_hat = run.coded(level, i)
        x = hfd.sample_picture(run.model.diffusion, x_hat, level - 1, seed=run.args.seed + i)
        jpeg, _ = sample.largest_within(len(data), image, optimize=True)
        shown = {"original": image, "JPEG": codecs.decode(jpeg),
                 "autoencoder": sample.to_image(x_hat, *image.size),
                 "HFD": sample.to_image(x, *image.size)}
        for name, picture in shown.items():
            found["power"].setdefault(name, []).append(radial_power(picture))
            found["grain"].setdefault(name, []).append(grain(picture, image))
        for name, file in (("JPEG", jpeg), ("HFD", data)):
            found["bpp"].setdefault(name, []).append(8 * len(file) / (image.width * image.height))
    return {kind: {name: np.mean(each, axis=0).tolist() for name, each in names.items()}
            for kind, names in found.items()}


def main(argv=None):
    """Average the spectra over all pictures, draw their ratios."""
    run = common.Run("spectrum", __doc__, argv, levels=[1, 4])
    for name, image in zip(run.names, run.images):
        if min(image.size) < 2 * BINS:
            raise HFDError(f"{name}: has {image.width}x{image.height} pixels, and a spectrum needs "
                           f"{2 * BINS} a side; leave it out")
    frequency, summary = (np.arange(BINS) + 0.5) / (2 * BINS), {}
    figure, panels = common.axes(len(run.args.levels))
    for panel, level in zip(panels, run.args.levels):
        point = run.point(f"level {level}", lambda: spectra(run, level))
        lines, own = [("original", [0, 0.5], [0, 0], (common.GREY, ""))], point["grain"]["original"]
        for name in ("JPEG", "autoencoder", "HFD"):
            gain = 10 * np.log10(np.divide(point["power"][name], point["power"]["original"]))
            lines.append((name, frequency, gain, (common.LOOK[name][0], "")))
            found = summary[f"level {level}, {name}"] = {
                f"db_at_{where}": round(gain[n].item(), 2) for where, n in SHOWN.items()}
            found |= {"grain": round(point["grain"][name], 3),
                      "grain_over_original": round(point["grain"][name] / own, 3)}
            print(f"level {level}, {name}: {found}")
        print(f"level {level}, bits per pixel: {point['bpp']}, grain of the original: {own:.3f}")
        common.draw(panel, lines, title=f"Level {level}: power relative to the original",
                    xlabel="cycles per pixel", ylabel="dB")
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    sample.run(main)
