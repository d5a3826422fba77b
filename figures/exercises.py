"""The numbers in the answers to the README's exercises, measured on the portrait.

    python -m figures.exercises

It does what a student does who tries them one after the other; read it only after you have tried.
"""
import argparse
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import entropy
import hfd
import sample
from figures import common

LEVEL = 2


def gradient(image):
    """Mean difference of horizontal neighbours in the grey picture: a measure of texture."""
    return float(np.abs(np.diff(np.asarray(image.convert("L"), float), axis=1)).mean())


def knobs(image, model):
    """Exercises 1 to 4 and 7: what the decoder can be asked to do with one file."""
    data, _ = sample.compress(image, model, LEVEL)
    decode = lambda **settings: sample.decompress(data, model, **settings)[0]
    psnr = lambda picture: f"{sample.psnr(image, picture):.2f}"
    whole = np.asarray(decode(patch=max(image.size), context=0), float)
    for context in (0, 32, 128):
        print(f"1. context {context:3}: worst pixel {np.abs(np.asarray(decode(patch=64, context=context)) - whole).max():.0f} / 255 off one patch for all")
    print("2. rho 0, .25, .5, .75, 1: PSNR " + ", ".join(psnr(decode(rho=rho)) for rho in (0, 0.25, 0.5, 0.75, 1)))
    draws = [decode(seed=seed) for seed in (1, 2, 3, 4)]
    mean = np.mean([np.asarray(picture, float) for picture in draws], axis=0).round().astype(np.uint8)
    print("3. seeds 1 to 4: PSNR " + ", ".join(map(psnr, draws)) + ", of their mean " + psnr(Image.fromarray(mean)))
    for name, settings in (("4 steps", {"eta": 0.5, "steps": 4}), ("50 ancestral steps", {"eta": 0.5, "steps": 50, "sampler": "ddpm"}), ("default", {})):
        picture = decode(**settings)
        print(f"4. {name}" + (", eta .5" if settings else "") + f": PSNR {psnr(picture)}, texture {gradient(picture):.2f}")
    k, _ = sample.decode_latent(sample.parse(data, "file"), model, "file")
    x_hat = model.autoencoder.decode(k, LEVEL - 1)
    cells = (1, 1, x_hat.shape[-2] // hfd.CELL, x_hat.shape[-1] // hfd.CELL)
    for energy in (None, 1, 4, 7):
        x = hfd.sample_picture(model.diffusion, x_hat, LEVEL - 1, energy=energy and torch.full(cells, float(energy), device=x_hat.device))
        print(f"7. map {energy}: texture {gradient(sample.to_image(x, *image.size)):.2f}")


def towards_zero(autoencoder, k, x, q):
    """Exercise 10: the latent k (1, M, h, w) of x at level q, with those symbols one nearer to zero for which that lowers rate + lambda * error, if
    the transform were orthonormal and the context stayed what it is."""
    level, k = torch.tensor([q]), k.float()
    price = autoencoder.config.lambdas[q] * 127.5 ** 2 / 3
    cost = lambda u: (autoencoder.prior.bits(u, k, autoencoder.step(level), level) +
                      price * (autoencoder.dequantize(u, level) - autoencoder.analysis(x, level)).square())     # (1, M, h, w)
    return torch.where(cost(k - k.sign()) < cost(k), k - k.sign(), k).int()


def bits(image, model):
    """Exercises 5, 6, 8 and 10: what the autoencoder's and the coder's parts are worth, level by level."""
    autoencoder, x = model.autoencoder, sample.to_tensor(image, "cpu")                              # (1, 3, H', W')
    levels = range(len(autoencoder.config.lambdas))
    latents = [autoencoder.encode(x, q) for q in levels]
    size = lambda tables, latents=latents: np.array([len(entropy.encode(k[0].numpy(), tables, q)) for q, k in enumerate(latents)])
    picture = lambda k, q: sample.to_image(autoencoder.decode(k, q), *image.size)
    psnr, texture = (lambda k, q: sample.psnr(image, picture(k, q))), (lambda k, q: gradient(picture(k, q)))
    show = lambda values: ", ".join(f"{value:+.2f}" for value in values)
    before, bytes_before, offset = [psnr(k, q) for q, k in enumerate(latents)], size(model.tables), autoencoder.offset.data.clone()
    autoencoder.offset.data.zero_()
    print("5. without offsets: PSNR " + show(psnr(k, q) - before[q] for q, k in enumerate(latents)) + " dB")
    autoencoder.offset.data.copy_(offset)
    for part in ("shift", "near", "across", "window"):
        deaf = replace(model.tables, **{part: torch.zeros_like(getattr(model.tables, part))})
        print(f"6. without {part}: " + show(100 * (size(deaf) / bytes_before - 1)) + " % of the bytes")
    precision = entropy.PRECISION
    try:
        entropy.PRECISION, entropy.TOTAL = 16, 1 << 16
        print("8. 16 bits: " + show(100 * (size(entropy.freeze(autoencoder.prior, autoencoder.log_step.exp())) / bytes_before - 1)) + " % of the bytes")
    finally:
        entropy.PRECISION, entropy.TOTAL = precision, 1 << precision
    rounded = [towards_zero(autoencoder, k, x, q) for q, k in enumerate(latents)]
    bytes_after = size(model.tables, rounded)

    def at_equal_bytes(number):
        """number(k, q) after rounding towards zero, over what plain rounding has in as many bytes, which is between two levels: from level 2 on."""
        usual, after = (np.log([number(k, q) for q, k in enumerate(some)]) for some in (latents, rounded))
        return np.exp(after - np.interp(np.log(bytes_after), np.log(bytes_before), usual))[1:]

    def objective(k, q):
        """What training minimises, of this one picture."""
        bpp, mse = autoencoder.cost(k.float(), k.float(), x, torch.tensor([q]))                     # (1,) each
        return (bpp + autoencoder.config.lambdas[q] * mse).item()
    print("10. rounding towards zero: " + show(100 * (bytes_after / bytes_before - 1)) + " % of the bytes")
    print("10. rounding towards zero: " + show(100 * (objective(b, q) / objective(a, q) - 1) for q, (a, b) in enumerate(zip(latents, rounded))) +
          " % of rate + lambda * error")
    print("10. at equal bytes, from level 2 on: squared error " + show(100 * (at_equal_bytes(lambda k, q: 10 ** (-psnr(k, q) / 10)) - 1)) +
          " %, texture " + show(100 * (at_equal_bytes(texture) - 1)) + " %")
    k = autoencoder.encode(x, LEVEL - 1, refine=60)
    latents[LEVEL - 1] = k
    print(f"10. --refine 60, level {LEVEL}: {100 * (size(model.tables) / bytes_before - 1)[LEVEL - 1]:+.2f} % of the bytes, "
          f"{psnr(k, LEVEL - 1) - before[LEVEL - 1]:+.3f} dB")


@torch.no_grad()
def main(argv=None):
    """Print them all."""
    parser = argparse.ArgumentParser(prog="python -m figures.exercises", description=__doc__.split("\n")[0])
    parser.add_argument("--model", metavar="FILE", default=sample.MODEL, help="checkpoint")
    parser.add_argument("--quick", action="store_true", help="on the middle of the portrait")
    args = parser.parse_args(argv)
    model, (_, image) = hfd.load_model(args.model), common.pictures(middle=256 if args.quick else None)[0]
    knobs(image, model)
    bits(image, model)


if __name__ == "__main__":
    hfd.run(main)
