"""The numbers in the answers to the exercises, on the portrait at level 2 or at all six levels.

    python -m figures.exercises
"""
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from PIL import Image

import entropy
import hfd
import sample
from figures import common, metrics

LEVEL = 2


def decoded(run, level=LEVEL, **settings):
    """The portrait's file at that level, decoded so."""
    return sample.decompress(run.coded(level, 0)[0], run.model, **settings)[0]


def texture(image):
    """Mean difference of horizontal neighbours in the grey picture."""
    return float(np.abs(np.diff(np.asarray(image.convert("L"), float), axis=1)).mean())


def decoder(run):
    """Exercises 1 to 4 and 7: what the decoder can be asked to do with one file."""
    def psnr(picture):
        """Of a decoded picture, in dB, against the portrait."""
        return f"{metrics.psnr(run.images[0], picture):.2f} dB"
    whole = np.asarray(decoded(run, patch=640, context=0), float)
    for context in (0, 32, 128):
        gap = np.abs(np.asarray(decoded(run, patch=64, context=context)) - whole).max()
        print(f"1. context {context}: worst pixel {gap:.0f} / 255 off one patch for all")
    print("2. rho 0, .25, .5, .75, 1:", *(psnr(decoded(run, rho=n / 4)) for n in range(5)))
    draws = [decoded(run, seed=seed) for seed in (1, 2, 3, 4)]
    mean = np.mean([np.asarray(picture, float) for picture in draws], axis=0).round()
    mean = Image.fromarray(mean.astype(np.uint8))
    print("3. seeds 1 to 4:", *map(psnr, draws), "their mean:", psnr(mean))
    for settings in ({"steps": 2}, {"eta": 0.5, "steps": 50, "sampler": "ddpm"}, {}):
        picture = decoded(run, **settings)
        print(f"4. {settings}: {psnr(picture)}, texture {texture(picture):.2f}")
    cells = [side // hfd.CELL for side in run.coded(LEVEL, 0)[1].shape[2:]]
    for value in (None, 1, 4, 7):
        energy = value and torch.full((1, 1, *cells), float(value), device=run.device)
        picture = sample.to_image(run.sample(LEVEL, 0, energy=energy), *run.images[0].size)
        print(f"7. map {value}: texture {texture(picture):.2f}")


def coder(run, ks):
    """Exercises 5, 6, 8 and 13: what there is in latents ks, one a level."""
    autoencoder, tables, image = run.model.autoencoder, run.model.tables, run.images[0]

    def sizes(tables):
        """(Q,) bytes of the latents with these tables."""
        return np.array([len(entropy.encode(k[0].cpu().numpy(), tables, q)[0])
                         for q, k in enumerate(ks)])

    def psnrs():
        """(Q,) PSNR of the autoencoder."""
        return np.array([metrics.psnr(image, decoded(run, level, rho=0))
                         for level in range(1, len(ks) + 1)])
    before, stored = psnrs(), autoencoder.offset.data.clone()
    autoencoder.offset.data.zero_()
    print("5. without offsets, dB of PSNR:", (psnrs() - before).round(2))
    autoencoder.offset.data.copy_(stored)
    found = {}
    for part in ("shift", "near", "across", "window"):
        deaf = replace(tables, **{part: np.zeros_like(getattr(tables, part))})
        found[f"6. without {part}"] = sizes(deaf)
    with mock.patch.multiple(entropy, PRECISION=16, TOTAL=1 << 16, BYTE=range(0, 65537, 256)):
        found["8. 16 bits"] = sizes(autoencoder.prior.freeze(autoencoder.log_step.exp()))
    usual = sizes(tables)
    for name, size in found.items():
        print(f"{name}, % more bytes:", (100 * size / usual - 100).round(1))
    for rho in (0, 1):
        shares = []
        for q, k in enumerate(ks):
            x = sample.to_tensor(decoded(run, q + 1, rho=rho), run.device)          # (1, 3, H', W')
            shares.append((autoencoder.encode(x, q) == k)[k != 0].float().mean().item())
        print(f"13. rho {rho}, % of symbols that come back:", (100 * np.array(shares)).round())


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("exercises", __doc__, argv, scored=False)
    if run.args.quick:
        run.images = [common.around_centre(run.images[0], 128)]
    x = sample.to_tensor(run.images[0], run.device)                                 # (1, 3, H', W')
    decoder(run)
    coder(run, [run.model.autoencoder.encode(x, q) for q in range(run.last_level)])


if __name__ == "__main__":
    sample.run(main)
