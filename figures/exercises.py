"""The numbers in the answers to the exercises, on the portrait at level 2 or at all levels.

    python -m figures.exercises --factorized runs/factorized
"""
import contextlib
import io
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import entropy
import hfd
import sample
import train
from figures import common
from figures.rate_distortion import with_same_transforms

Q = 1                                   # level 2


def texture(image):
    """Mean difference of horizontal neighbours in the grey picture."""
    return float(np.abs(np.diff(np.asarray(image.convert("L"), float), axis=1)).mean())


def signed(values):
    """Numbers of levels 1, 2, ..., in words."""
    return ", ".join(f"{value:+.2f}" for value in values)


def sizes(ks, tables):
    """(Q,) bytes of latents, one a level."""
    return np.array([len(entropy.encode(k[0].cpu().numpy(), tables, q)[0])
                     for q, k in enumerate(ks)])


def qualities(run, ks):
    """(PSNR (Q,), texture (Q,)) of what the autoencoder makes of latents, one a level."""
    found = []
    for q, k in enumerate(ks):
        header = sample.parse(run.coded(q + 1, 0)[0], "file")
        picture = sample.to_image(sample.reconstruct(k, header, run.model), *run.images[0].size)
        found.append((sample.psnr(run.images[0], picture), texture(picture)))
    return np.array(found).T


def decoder(run):
    """Exercises 1 to 4 and 7: what the decoder can be asked to do with one file."""
    def psnr(picture):
        """In words."""
        return f"{sample.psnr(run.images[0], picture):.2f} dB"

    def decode(**settings):
        """The portrait's file, decoded so."""
        return sample.decompress(data, run.model, **settings)[0]
    data, x_hat = run.coded(Q + 1, 0)
    whole = np.asarray(decode(patch=640, context=0), float)
    for context in (0, 32, 128):
        gap = np.abs(np.asarray(decode(patch=64, context=context)) - whole).max()
        print(f"1. context {context}: worst pixel {gap:.0f} / 255 off one patch for all")
    print("2. rho 0, .25, .5, .75, 1:", *(psnr(decode(rho=rho / 4)) for rho in range(5)))
    draws = [decode(seed=seed) for seed in (1, 2, 3, 4)]
    mean = np.mean([np.asarray(picture, float) for picture in draws], axis=0).round()
    mean = Image.fromarray(mean.astype(np.uint8))
    print("3. seeds 1 to 4:", *map(psnr, draws), "their mean:", psnr(mean))
    for settings in ({"eta": 0.5, "steps": 4}, {"eta": 0.5, "steps": 50, "sampler": "ddpm"}, {}):
        picture = decode(**settings)
        print(f"4. {settings}: {psnr(picture)}, texture {texture(picture):.2f}")
    cells = 1, 1, x_hat.shape[2] // hfd.CELL, x_hat.shape[3] // hfd.CELL
    for value in (None, 1, 4, 7):
        energy = value and torch.full(cells, float(value), device=run.device)
        x = hfd.sample_picture(run.model.diffusion, x_hat, Q, energy)
        print(f"7. map {value}: texture {texture(sample.to_image(x, *run.images[0].size)):.2f}")


def coder(run, ks):
    """Exercises 5, 6, 8 and 17: what the coder's parts are worth, level by level."""
    autoencoder, tables = run.model.autoencoder, run.model.tables
    before, stored = qualities(run, ks)[0], autoencoder.offset.data.clone()
    autoencoder.offset.data.zero_()
    print(f"5. without offsets: PSNR {signed(qualities(run, ks)[0] - before)} dB")
    autoencoder.offset.data.copy_(stored)
    others = {f"6. without {part}": replace(tables, **{part: np.zeros_like(getattr(tables, part))})
              for part in ("shift", "near", "across", "window")}
    with mock.patch.multiple(entropy, PRECISION=16, TOTAL=1 << 16, BYTE=range(0, 65537, 256)):
        sixteen = sizes(ks, autoencoder.prior.freeze(autoencoder.log_step.exp()))
    if run.args.factorized:
        others["17. without context"] = with_same_transforms(run, run.args.factorized).tables
    found = {name: sizes(ks, other) for name, other in others.items()} | {"8. 16 bits": sixteen}
    for name, size in found.items():
        print(f"{name}: {signed(100 * size / sizes(ks, tables) - 100)} % of the bytes")


def rounding(run, x, ks):
    """Exercise 10: latents rounded towards zero where that lowers rate + price * error."""
    autoencoder, rounded = run.model.autoencoder, []
    for q, k in enumerate(ks):
        level, costs = torch.tensor([q], device=run.device), []
        y, step = autoencoder.analysis(x, level), autoencoder.step(level)
        for u in (k.float(), (k - k.sign()).float()):
            error = (autoencoder.dequantize(u, level) - y).square() * 127.5 ** 2 / 3
            bits = autoencoder.prior.bits(u, k.float(), step, level)
            costs.append(bits + autoencoder.lambdas[q] * error)                     # (1, M, h, w)
        rounded.append(torch.where(costs[1] < costs[0], k - k.sign(), k))
    return rounded


@torch.enable_grad()
def refine(run, x, ks, steps=20):
    """Exercise 11: a better latent for this very picture, by gradient descent (Campos et al.
    2019)."""
    autoencoder, level = run.model.autoencoder, torch.tensor([Q], device=run.device)
    step, offset = autoencoder.step(level), autoencoder.offset[Q][:, None, None]
    u = (autoencoder.analysis(x, level) / step).detach().requires_grad_()           # (1, M, h, w)
    optimizer = torch.optim.Adam([u], lr=0.01)
    for n in range(steps):
        # Each value is drawn to the integer below or above, softly at first and harder and harder
        # (Yang, Bamler & Mandt 2020): so what is learned survives the rounding at the end.
        down = (u - u.floor()).clamp(1e-4, 1 - 1e-4)
        odds, heat = -torch.atanh(torch.stack([down, 1 - down])), 0.5 * np.exp(-3 * n / steps)
        soft = u.floor() + F.gumbel_softmax(odds / heat, heat, dim=0)[1]            # (1, M, h, w)
        bpp = autoencoder.prior.bits(soft, soft, step, level).sum() / x[0, 0].numel()
        x_hat = autoencoder.synthesis(step * (soft - offset * soft.clamp(-1, 1)), level)
        mse = (x_hat - x).square().mean() * 127.5 ** 2
        optimizer.zero_grad()
        (bpp + autoencoder.lambdas[Q] * mse).backward()
        optimizer.step()
    return ks[:Q] + [u.detach().round().int()] + ks[Q + 1:]


def muon(run):
    """Exercise 18 in small: two short trainings on dead leaves, by Muon and by AdamW alone."""
    def adam(groups):
        """In place of train.Muon."""
        return train.adam([group | {"peak": group["peak"] / 10} for group in groups])
    for name, optimizer in (("Muon", train.Muon), ("AdamW", adam)):
        with (tempfile.TemporaryDirectory() as folder, mock.patch("train.Muon", optimizer),
              contextlib.redirect_stdout(io.StringIO()) as said, torch.enable_grad()):
            shutil.copy(Path(run.args.model, "autoencoder.npz"), folder)
            less = "--steps 2 --batch 2 --crop 16" if run.args.quick else "--steps 150"
            train.main(["diffusion", "--out", folder, "--device", run.args.device, *less.split()])
        print(f"18. {name}: loss {said.getvalue().split('loss ')[-1].split()[0]} in the end")


@torch.no_grad()
def main(argv=None):
    """Print them all."""
    run = common.Run("exercises", __doc__, argv, scored=False, factorized=None)
    if run.args.quick:
        run.images = [common.around_centre(run.images[0], 128)]
    torch.manual_seed(run.args.seed)
    x = sample.to_tensor(run.images[0], run.device)                                 # (1, 3, H', W')
    ks = [run.model.autoencoder.encode(x, q) for q in range(run.last_level)]
    decoder(run)
    coder(run, ks)
    for name, better in (("10. rounded towards zero", rounding(run, x, ks)),
                         (f"11. refined at level {Q + 1}", refine(run, x, ks))):
        found = []
        for some in (ks, better):
            size, (psnr, own) = sizes(some, run.model.tables), qualities(run, some)
            mse = run.model.autoencoder.lambdas.cpu().numpy() * 255 ** 2 * 10 ** (-psnr / 10)
            found.append((size, own, 8 * size / x[0, 0].numel() + mse, 10 ** (psnr / 10)))
        for what, before, after in zip(("bytes", "texture", "rate + lambda MSE"), *found):
            print(f"{name}: {what} {signed(100 * after / before - 100)} %")
        print(f"{name}: PSNR {signed(10 * np.log10(found[1][3] / found[0][3]))} dB")
    muon(run)


if __name__ == "__main__":
    sample.run(main)
