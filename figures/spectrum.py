"""Where is the missing energy? Radially averaged power spectra of what decoders make, relative to the originals'.

    python -m figures.spectrum --images KODAK --out figures

0 dB is a photograph's own power at that spatial frequency. Squared error tells a decoder to leave out what it cannot know: the autoencoder falls off.
JPEG less, since it puts its own edges in place of what it loses: power says nothing about place. The sampler's part is to bring the curve back to 0 dB.
"""
import numpy as np
import torch.nn.functional as F

import hfd
import sample
from figures import codecs, common

SIDE, BINS = 256, 64


def radial_power(image):
    """(BINS,) mean power of the grey picture's central square by spatial frequency, in equal bins from 0 to 1/2 cycles per pixel.

    A Hann window fades the borders: the Fourier transform takes pictures for periodic, and the jump at their edges for detail."""
    side = min(SIDE, *image.size)
    grey = np.asarray(common.around_centre(image, side).convert("L"), float)
    window = np.hanning(side)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window * window[:, None])) ** 2               # (side, side)
    radius = np.hypot(np.fft.fftfreq(side), np.fft.fftfreq(side)[:, None])
    which = np.minimum((radius * 2 * BINS).astype(int), BINS)                                       # beyond 1/2: corners, left out
    return np.bincount(which.ravel(), power.ravel())[:BINS] / np.bincount(which.ravel())[:BINS]


def grain(image, original):
    """The rms of fine colour in `image`, in steps of 1/255, over the twentieth of all 16-pixel squares where `original` is flattest:
    a sky, say. What exceeds the original's there is coloured grain. Both PIL RGB, of one size."""
    whole = (0, 0, image.width // 16 * 16, image.height // 16 * 16)
    planes = [hfd.to_planes(127.5 * sample.to_tensor(x.crop(whole), "cpu"))[0] for x in (image, original)]  # (12, H/2, W/2) each
    fine = [F.avg_pool2d(p.square(), 8).reshape(3, 4, -1)[:, 1:].sum(dim=1) for p in planes]            # (3, squares): all but the means, per colour axis
    flattest = fine[1].sum(dim=0).argsort()[:max(fine[1].shape[1] // 20, 1)]
    return (fine[0][1:, flattest].mean() / 3).sqrt().item()                                             # of red - blue and magenta - green


def main(argv=None):
    """Average the spectra over all pictures, draw their ratios."""
    run = common.Run("spectrum", __doc__, argv, levels=[1, 4])

    def compute(level):
        """Mean spectra, grain and bits per pixel over all pictures, by name."""
        spectra, grains, bpp = {}, {}, {}
        for i, image in enumerate(run.images):
            data, x_hat = run.coded(level, i)
            x = hfd.sample_picture(run.model.diffusion, x_hat, level - 1, seed=run.args.seed + i)
            jpeg, _ = sample.largest_within(len(data), image, optimize=True)
            for name, file in (("JPEG", jpeg), ("HFD", data)):
                bpp.setdefault(name, []).append(8 * len(file) / (image.width * image.height))
            for name, picture in (("original", image), ("JPEG", codecs.decode(jpeg)), ("autoencoder", sample.to_image(x_hat, *image.size)),
                                  ("HFD", sample.to_image(x, *image.size))):
                spectra.setdefault(name, []).append(radial_power(picture))
                grains.setdefault(name, []).append(grain(picture, image))
            run.progress(f"level {level}", i)
        return {"power": {name: np.mean(each, axis=0).tolist() for name, each in spectra.items()},
                "grain": {name: round(float(np.mean(each)), 4) for name, each in grains.items()},
                "bpp": {name: round(float(np.mean(each)), 4) for name, each in bpp.items()}}

    frequency = (np.arange(BINS) + 0.5) / (2 * BINS)
    figure, panels = common.axes(len(run.args.levels))
    for panel, level in zip(panels, run.args.levels):
        point = run.point(f"level {level}", lambda: compute(level))
        power = point["power"]
        print(f"level {level}, bits per pixel: " + ", ".join(f"{name} {number:.3f}" for name, number in point["bpp"].items()))
        print("fine colour in the flattest squares (1/255): " + ", ".join(f"{name} {number:.2f}" for name, number in point["grain"].items()))
        ends = [(frequency[-1], 0, "original", common.GREY)]
        panel.axhline(0, color=common.GREY)
        for name in ("JPEG", "autoencoder", "HFD"):
            gain = 10 * np.log10(np.divide(power[name], power["original"]))                         # (BINS,)
            panel.plot(frequency, gain, color=common.LOOK[name][0])
            ends.append((frequency[-1], gain[-1], name, common.LOOK[name][0]))
            print(f"{name:12}: {gain[BINS // 4]:+.1f} dB at 1/8, {gain[BINS // 2]:+.1f} dB at 1/4, {gain[-1]:+.1f} dB at 1/2 cycles per pixel")
        panel.set(title=f"Level {level}: power relative to the original", xlabel="cycles per pixel", ylabel="dB")
        common.label_ends(panel, ends)
    run.finish(figure)


if __name__ == "__main__":
    hfd.run(main)
