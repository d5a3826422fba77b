"""Where is the missing energy? Power spectra relative to the originals', and coloured grain.

    python -m figures.spectrum --images KODAK --out figures
"""
import numpy as np
import torch.nn.functional as F

import hfd
import sample
from figures import codecs, common

SIDE, BINS = 256, 64
SHOWN = {"1/8": BINS // 4, "1/4": BINS // 2, "1/2": BINS - 1}           # cycles per pixel
LOOK = {"original": (common.GREY, "")} | common.LOOK


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
    """{name: {number: mean over all pictures}} of power, grain (1/255) and bits per pixel."""
    found = {}
    for i, image in enumerate(run.images):
        data, x_hat = run.coded(level, i)
        jpeg, _ = codecs.largest_within(len(data), "JPEG", image)
        shown = {"original": (b"", image), "JPEG": (jpeg, codecs.decode(jpeg)),
                 "autoencoder": (data, sample.to_image(x_hat, *image.size)),
                 "HFD": (data, sample.to_image(run.sample(level, i), *image.size))}
        for name, (file, picture) in shown.items():
            found.setdefault(name, []).append({
                "power": radial_power(picture), "grain": grain(picture, image),
                "bpp": 8 * len(file) / (image.width * image.height)})
    return {name: {number: np.mean([row[number] for row in rows], axis=0).tolist()
                   for number in rows[0]} for name, rows in found.items()}


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("spectrum", __doc__, argv, levels=[1, 4])
    frequency, summary = (np.arange(BINS) + 0.5) / (2 * BINS), {}
    figure, panels = common.axes(len(run.args.levels))
    for panel, level in zip(panels, run.args.levels):
        point = run.point(f"level {level}", lambda: spectra(run, level))
        lines, original = [], point["original"]
        for name in ("original", "JPEG", "autoencoder", "HFD"):
            own = point[name]
            gain = 10 * np.log10(np.divide(own["power"], original["power"]))
            lines.append((name, frequency, gain, (LOOK[name][0], "")))
            found = summary[f"level {level}, {name}"] = {
                f"db_at_{where}": round(gain[n].item(), 2) for where, n in SHOWN.items()}
            found |= {"bpp": round(own["bpp"], 4), "grain": round(own["grain"], 3)}
            print(f"level {level}, {name}: {found}")
        common.plot(panel, lines, title=f"Level {level}: power relative to the original",
                    xlabel="cycles per pixel", ylabel="dB")
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    sample.run(main)
