"""Pictures: an autoencoder that spends the bits, and a diffusion model that draws what they could not pay for.

A small, complete implementation of "High-Fidelity Image Compression with Score-based Generative Models"
(Hoogeboom, Agustsson, Mentzer, Versari, Toderici, Theis 2023, arXiv 2305.18231), called HFD. Two stages:

    x --encoder--> y --round--> k --range coder--> file --> k --decoder--> x_hat --diffusion--> x_sample

1. An autoencoder, trained for rate + lambda * MSE and nothing else. Its picture x_hat is right but blurry: the best guess
   under squared error is an average over everything that the bits leave open.
2. A conditional diffusion model, trained to sample x given x_hat. It costs no bits at all.

The file goes in that order: the autoencoder, the noise schedule, the denoiser and its loss, the samplers, pictures of
any size; housekeeping comes last. Symbols are the paper's: x image, y latent, x_hat reconstruction, t in [0, 1] time, z_t noisy
image, eps noise, v velocity, alpha_t and sigma_t the scales of signal and noise, log_snr = log(alpha_t^2 / sigma_t^2).
Pictures are float tensors (B, 3, H, W), RGB, in [-1, 1].
"""
import contextlib
import hashlib
import itertools
import math
import os
import pickletools
import platform
import re
import resource
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from entropy import Prior, Tables

# Stage 1: the autoencoder -----------------------------------------------------------------------------

CELL = 16   # pixels per latent sample and side. Every network's total stride divides it; pictures are padded to it.


@dataclass
class AutoencoderConfig:
    """What rebuilds an Autoencoder. One entry of `lambdas` per quality level: the price of squared error, in
    bits per pixel for one unit of MSE on the scale 0..255. Widths and blocks per stage, at 1/2, 1/4, 1/8, 1/16."""
    lambdas: tuple = (0.0004, 0.0009, 0.0019, 0.0042, 0.0091, 0.02)
    latents: int = 320
    widths: tuple = (32, 64, 128, 160)
    blocks: tuple = (0, 1, 2, 2)


# An orthonormal rotation of (R, G, B): grey, red - blue, magenta - green. Nearly all of a photograph is in the first.
COLOUR = F.normalize(torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64))


def transform_basis(count):
    """The `count` most important functions of an orthonormal colour + lapped transform, shape (count, 3, 32, 32).

    Start from what is known. JPEG's idea: rotate the colours so that most energy is in one channel, then expand each block of
    pixels in cosines (DCT; Ahmed, Natarajan & Rao 1974); photographs put nearly all their energy into few of the coefficients.

    Blocks show their edges at low rates, so JPEG's blocks are replaced by functions twice as wide that overlap
    by half and still form an orthonormal basis: the lapped orthogonal transform (Malvar & Staelin 1989). Its recipe: the even
    and odd cosines of a block, subtracted, nearly vanish at one end, so that together with their mirror image in the
    neighbouring block they fade in and out; then one more rotation packs the energy.

    Energy of what? Neighbouring pixels of a photograph have a correlation of about 0.95, so model a row of
    pixels as a first-order Markov chain, covariance 0.95^|i - j|, in both directions independently. The expected energy of
    a product function is then the product of the energies; colour gets a twentieth of grey's."""
    n = torch.arange(CELL, dtype=torch.float64)
    dct = torch.cos(math.pi / CELL * (n + 0.5) * n[:, None]) * math.sqrt(2 / CELL)              # (frequency, pixel)
    dct[0] /= math.sqrt(2)
    fade = (dct[0::2] - dct[1::2]) / 2                                                          # (8, 16)
    lapped = torch.cat([torch.cat([fade, fade.flip(1)], 1), torch.cat([fade, -fade.flip(1)], 1)])  # (16, 32)
    wide = torch.arange(2 * CELL, dtype=torch.float64)
    covariance = 0.95 ** (wide - wide[:, None]).abs()                                           # (32, 32)
    energy, rotation = torch.linalg.eigh(lapped @ covariance @ lapped.T)                        # (16,), (16, 16)
    lapped = rotation.T @ lapped
    importance = torch.tensor([1, 0.05, 0.05])[:, None, None] * energy[:, None] * energy        # (3, 16, 16)
    chosen = importance.flatten().argsort(descending=True)[:count]
    c, u, v = chosen // CELL ** 2, chosen // CELL % CELL, chosen % CELL                         # each (count,)
    return torch.einsum("mc,mi,mj->mcij", COLOUR[c], lapped[u], lapped[v]).float()              # (count, 3, 32, 32)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), with a gain per channel and quality level in the middle.

    The gain is all that tells the transforms how coarsely this image is quantized."""

    def __init__(self, width, levels):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(levels, width))

    def forward(self, x, q):
        """x: (B, C, h, w); q: (B,) levels. Returns the shape of x."""
        h = self.conv1(F.relu(x)) * self.gain[q][:, :, None, None].to(x.dtype)                  # (B, C, h, w)
        return x + self.conv2(F.relu(h))


class Transform(nn.Module):
    """A linear path plus a deep one. The linear path is one convolution and starts as a transform codec that works. The deep path has four
    stride-2 stages, with residual blocks where resolution is low, like the transforms of ELIC (He et al. 2022); its last layer starts at
    zero, so that all it ever does is improve on the linear one."""

    def forward(self, x, q):
        """x: (B, C, ., .), as both paths take it; q: (B,) levels, of which only residual blocks are told. Returns float32."""
        x = h = x.contiguous(memory_format=torch.channels_last)                                 # (B, C, ., .)
        for layer in self.deep:
            h = layer(h, q) if isinstance(layer, ResidualBlock) else layer(h)
        return self.linear(x).float() + h.float()


class Analysis(Transform):
    """Picture x (B, 3, H, W) in [-1, 1], sides multiples of 16, to latent y (B, M, H/16, W/16). Strides come from `PixelUnshuffle`: each
    2x2 square of pixels becomes one pixel of four times the channels, so that no convolution runs at full resolution."""

    def __init__(self, config, basis):
        super().__init__()
        # The lapped transform is a 32x32 convolution at stride 16. Laying each 16x16 block into channels first makes it a 2x2
        # convolution: the same numbers by a plain matrix product, two to three times as fast.
        conv = nn.Conv2d(3 * CELL ** 2, config.latents, 2)
        conv.weight.data.copy_(F.pixel_unshuffle(basis, CELL))
        nn.init.zeros_(conv.bias)
        self.linear = nn.Sequential(nn.ZeroPad2d(CELL // 2), nn.PixelUnshuffle(CELL), conv)
        layers, width = [], 3
        for w, n in zip(config.widths, config.blocks):
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * width, w, 3, padding=1)]
            layers += [ResidualBlock(w, len(config.lambdas)) for _ in range(n)]
            width = w
        layers += [nn.ReLU(), nn.Conv2d(width, config.latents, 1)]
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.deep = nn.ModuleList(layers)


class Synthesis(Transform):
    """Dequantized latent y_hat (B, M, h, w) to reconstruction x_hat (B, 3, 16 h, 16 w), not yet clamped to [-1, 1]. The transpose of an
    orthonormal matrix is its inverse, so the linear path starts from the same basis."""

    def __init__(self, config, basis):
        super().__init__()
        conv = nn.Conv2d(config.latents, 3 * CELL ** 2, 2, padding=1)
        # Transposing a convolution exchanges its channels and turns its kernel around.
        conv.weight.data.copy_(F.pixel_unshuffle(basis, CELL).transpose(0, 1).flip(2, 3))
        nn.init.zeros_(conv.bias)
        self.linear = nn.Sequential(conv, nn.PixelShuffle(CELL), nn.ZeroPad2d(-CELL // 2))
        width = config.widths[-1]
        layers = [nn.Conv2d(config.latents, width, 3, padding=1)]
        for w, n in zip(config.widths[-2::-1] + (3,), config.blocks[::-1]):
            layers += [ResidualBlock(width, len(config.lambdas)) for _ in range(n)]
            layers += [nn.Conv2d(width, 4 * w, 3, padding=1), nn.PixelShuffle(2)]
            width = w
        nn.init.zeros_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
        self.deep = nn.ModuleList(layers)


class Autoencoder(nn.Module):
    """Transforms, quantization steps and prior: everything about the bits.

    The paper trains one autoencoder per rate. Here one serves the whole rate-distortion curve, quality levels q = 0 .. Q-1: level q
    quantizes channel m with a step of its own, step[q, m]; coarse steps give few bits. The prior is continuous, so it knows the
    probabilities for every step.
    """

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        with torch.device("cpu"):                           # whatever device the rest is built on
            basis = transform_basis(config.latents)
        self.analysis, self.synthesis = Analysis(config, basis), Synthesis(config, basis)
        self.prior = Prior(config.latents, len(config.lambdas))
        # Which steps to start from: at high rate, a coefficient quantized with step d costs h - log2 d bits (h is its differential
        # entropy) and has the squared error d^2 / 12. Setting the derivative of rate + price * error to zero: d^2 = 6 / (price ln 2).
        # The transform is orthonormal, so that errors in y are errors in x. `price` is lambda for the squared error of one
        # coefficient: x is in units of 127.5, and MSE averages over three channels.
        price = torch.tensor(config.lambdas) * 127.5 ** 2 / 3
        self.log_step = nn.Parameter((0.5 * torch.log(6 / (price * math.log(2))))[:, None].repeat(1, config.latents))
        self.offset = nn.Parameter(torch.zeros(len(config.lambdas), config.latents))            # see dequantize

    def step(self, q):
        """The quantization steps of levels q (B,): (B, M, 1, 1)."""
        return self.log_step[q].exp()[:, :, None, None]

    def dequantize(self, k, q):
        """Integers k (B, M, h, w) at levels q (B,) to y_hat. Not to the middle of each bin: small values are more probable than large
        ones, so what fell into a bin lies on the side of zero more often than not. How far to move there is learned."""
        # On integers clamp(-1, 1) is the sign; `refine` has numbers in between, where it is continuous.
        return self.step(q) * (k - self.offset[q][:, :, None, None] * k.clamp(-1, 1))           # (B, M, h, w)

    def forward(self, x, q, prior_only=False):
        """The training objective. x: (B, 3, H, W) in [-1, 1], H and W multiples of 16; q: (B,) levels.

        Returns a dict of (B,) tensors: `loss`, `bpp` (estimated bits per pixel), `mse` (per channel, on the scale 0..255). With prior_only
        there is no error, only the rate, and that of the integers themselves: nothing needs a gradient through rounding.
        """
        u = self.analysis(x, q) / self.step(q)                                                  # (B, M, h, w)
        lambdas = torch.tensor(self.config.lambdas, device=x.device)
        # Rate + lambda * MSE is some ten times larger at the last level than at the first. Dividing by sqrt(lambda) lets one per cent of it
        # weigh about the same at each.
        weight = (lambdas.mean() / lambdas[q]).sqrt()
        if prior_only:
            bpp = self.bpp(u.round(), u.round(), x, q)                                          # (B,)
            return {"loss": weight * bpp, "bpp": bpp}
        # Rounding has no gradient. For the rate, uniform noise as wide as a step stands in for it (Balle et al. 2017):
        # the noisy latent's density is, at every integer, exactly that bin's probability, and smooth in between. But the decoder
        # must see what it will see in earnest, truly rounded values; there the gradient passes straight through to u. So the
        # step is pushed by both: the rate wants it wide, the error wants it narrow.
        bpp, mse = self.cost(u + torch.rand_like(u) - 0.5, u + (u.round() - u).detach(), x, q)  # (B,) each
        return {"loss": weight * (bpp + lambdas[q] * mse), "bpp": bpp, "mse": mse}

    def bpp(self, for_rate, for_context, x, q):
        """Estimated bits per pixel, (B,), of pictures x at levels q. Two stand-ins for the integer latent, (B, M, h, w), in units of steps."""
        bits = self.prior.bits(for_rate, for_context, self.step(q), q).sum(dim=(1, 2, 3))       # (B,)
        return bits / (x.shape[-2] * x.shape[-1])

    def cost(self, for_rate, for_decoder, x, q):
        """(bpp, mse), (B,) each, of pictures x at levels q. Two stand-ins for the integer latent, as in `bpp`."""
        x_hat = self.synthesis(self.dequantize(for_decoder, q), q)                              # (B, 3, H, W)
        return self.bpp(for_rate, for_decoder, x, q), (x_hat - x).square().mean(dim=(1, 2, 3)) * 127.5 ** 2

    def refine(self, x, q, steps, on_step=lambda step: None):
        """Better latents for these very pictures, in units of steps, (B, M, h, w); with 0 steps the encoder's own. The decoder need not know.

        The encoder is a compromise over all that it was trained on; descending the gradient of a picture's own rate + lambda * MSE finds
        bits that it left lying (Campos et al. 2019). The difficulty is rounding. Stochastic Gumbel annealing (Yang, Bamler & Mandt 2020) draws
        each value to the integer below or the one above, softly at first and harder and harder, near ones more often: what is
        learned early survives the rounding at the end. The draws are seeded, so on a CPU the same picture gives the same bytes."""
        u = (self.analysis(x, q) / self.step(q)).requires_grad_()                               # (B, M, h, w)
        optimizer = torch.optim.Adam([u], lr=0.01)
        lambdas = torch.tensor(self.config.lambdas, device=x.device)
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(0)
            for i in range(steps):
                # The odds of either neighbour: exp(-atanh(distance to it) / temperature). The temperature falls from 0.5 to 0.025.
                temperature = 0.5 * math.exp(-3 * i / steps)
                down = (u - u.floor()).clamp(1e-4, 1 - 1e-4)                                    # (B, M, h, w), in (0, 1)
                logits = torch.stack([-torch.atanh(down), -torch.atanh(1 - down)]) / temperature        # (2, B, M, h, w)
                soft = u.floor() + F.gumbel_softmax(logits, temperature, dim=0)[1]              # (B, M, h, w)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bf16(x.device)):
                    bpp, mse = self.cost(soft, soft, x, q)
                optimizer.zero_grad()
                (bpp + lambdas[q] * mse).sum().backward()
                optimizer.step()
                on_step(i + 1)
        return u.detach()

    @torch.no_grad()
    def encode(self, x, q, refine=0, on_step=lambda step: None):
        """Picture (1, 3, H, W) in [-1, 1], sides multiples of 16, to its integer latent k (1, M, H/16, W/16), int32.

        refine: steps of `refine`, 0 for none. Tiles are searched one by one, and need not agree in the margins that they share, nor in which
        pass a cell is coded; this may cost a few bits, but nothing goes wrong, for the decoder sees one latent.
        on_step is told how many of these steps are done."""
        u = x.new_empty(1, self.config.latents, x.shape[-2] // CELL, x.shape[-1] // CELL)
        level, tile, context = torch.tensor([q], device=x.device), *((512, 64) if refine else (1024, 160))
        done, tiles = itertools.count(1), math.prod(math.ceil(s / tile) for s in x.shape[-2:])
        report = lambda step: on_step(next(done) / tiles)   # steps done, of all tiles together
        apply_tiled(lambda window: self.refine(window, level, refine, report), [x], u, tile, context)
        return u.round().int()

    @torch.no_grad()
    def decode(self, k, q):
        """Integer latent k (1, M, h, w) to the reconstruction x_hat (1, 3, 16 h, 16 w), in [-1, 1]."""
        level = torch.tensor([q], device=k.device)
        x_hat = torch.empty(1, 3, CELL * k.shape[-2], CELL * k.shape[-1], device=k.device)
        return apply_tiled(lambda window: self.synthesis(self.dequantize(window, level), level), [k], x_hat).clamp_(-1, 1)


# Noise ------------------------------------------------------------------------------------------------
# Diffusion (Sohl-Dickstein et al. 2015; Ho et al. 2020) destroys a picture gradually and learns to go back:
#
#     z_t = alpha_t x + sigma_t eps,   eps ~ N(0, I),   alpha_t^2 + sigma_t^2 = 1   ("variance preserving")
#
# All that matters about time is the ratio of signal to noise, log_snr = log(alpha^2 / sigma^2), which falls
# from very clean (t = 0) to pure noise (t = 1). Which t sees which ratio is the *schedule*.


def alpha_sigma(log_snr):
    """(alpha, sigma) of a log signal-to-noise ratio: alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr)."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def log_snr_at(t, eta):
    """The shifted cosine schedule: log_snr(t; eta) = -2 log(eta * tan(pi t / 2)), clamped to +-15 at the ends.

    eta = 1 is the cosine schedule (Nichol & Dhariwal 2021, without their offset; as a log SNR in *simple diffusion*, Hoogeboom et
    al. 2023). A factor eta on sigma / alpha moves all of it by -2 log eta. HFD (paper, section on the noise schedule) uses
    eta = 0.5, *less* noise: x_hat already holds the global structure, and what is left to decide is fine detail, which little noise
    is enough to hide. (Text to image shifts the other way, *simple diffusion* again: there the structure must be invented too.)

    t: tensor in [0, 1]. Returns its shape."""
    # tan = sin / cos, and cos(pi t / 2) = sin(pi (1 - t) / 2): written so, both stay positive up to the ends.
    noise, signal = torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * (1 - t))
    return (-2 * torch.log(eta * noise / signal)).clamp(-15, 15)


def flow_log_snr_at(t, eta):
    """The schedule of rectified flow (Liu et al. 2023; Lipman et al. 2023; the paper's variant), which goes from picture to noise
    in a straight line: z'_t = (1 - t) x + t eps. Its log SNR is 2 log((1 - t) / t), shifted by eta as above.

    That is all that sets it apart, by three facts. A point z' on the line is z times a constant, at the same SNR. The network's target is
    eps - x = (sigma - alpha) z + (alpha + sigma) v, where z is known, so its error is (alpha + sigma) times that of v. And an Euler step
    along the line is a DDIM step. So flow is v-prediction with another schedule and, where nothing else weighs the loss, the weight
    (alpha + sigma)^2 (Kingma & Gao 2023); it needs no code of its own beyond these. The tests show all three.

    t, returns: as log_snr_at."""
    return (-2 * torch.log(eta * t / (1 - t))).clamp(-15, 15)


SCHEDULES = {"v": log_snr_at, "flow": flow_log_snr_at}


# Stage 2: the denoiser --------------------------------------------------------------------------------


class ChannelNorm(nn.Module):
    """Divide each pixel by the root mean square of its own channels (RMSNorm, Zhang & Sennrich 2019).

    Group norm, the usual choice, averages over all pixels, so that every output pixel would depend on the whole picture
    and no patch could be computed by itself."""

    def forward(self, x):
        """x: (B, C, h, w). Returns its shape, each pixel with mean square 1 over its channels."""
        return x * (x.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)            # (B, C, h, w)


class UNetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. The conditioning sets a scale and a shift per channel in between (FiLM,
    Perez et al. 2018); the second convolution's weights start at zero, so that the block starts as the identity but for a constant."""

    def __init__(self, width, conditioning):
        super().__init__()
        self.norm = ChannelNorm()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(conditioning, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, c):
        """x: (B, C, h, w); c: (B, conditioning). Returns the shape of x."""
        scale, shift = self.film(c)[:, :, None, None].chunk(2, dim=1)                           # (B, C, 1, 1) each
        h = self.conv1(F.silu(self.norm(x)))                                                    # (B, C, h, w)
        h = self.norm(h) * (1 + scale) + shift                                                  # (B, C, h, w)
        return x + self.conv2(F.silu(h))


class UNet(nn.Module):
    """A compact U-Net (Ronneberger et al. 2015): two halvings and two doublings of the resolution, with additive shortcuts. No attention and
    nothing that mixes distant pixels: see `apply_tiled` for what that buys."""

    def __init__(self, inputs, outputs, widths, blocks, levels, conditioning=128):
        super().__init__()
        self.level = nn.Embedding(levels, conditioning)
        self.embed = nn.Sequential(nn.Linear(64, conditioning), nn.SiLU(), nn.Linear(conditioning, conditioning))
        stack = lambda width: nn.ModuleList(UNetBlock(width, conditioning) for _ in range(blocks))
        pairs = list(zip(widths, widths[1:]))
        self.stem = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList(stack(w) for w in widths)
        self.shrink = nn.ModuleList(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1)) for a, b in pairs)
        self.up = nn.ModuleList(stack(w) for w in widths)
        self.grow = nn.ModuleList(nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)) for a, b in pairs)
        self.head = nn.Sequential(ChannelNorm(), nn.Conv2d(widths[0], outputs, 3, padding=1))
        nn.init.zeros_(self.head[1].weight)
        nn.init.zeros_(self.head[1].bias)

    def forward(self, x, log_snr, q):
        """x: (B, inputs, h, w), sides multiples of 4; log_snr: (B,); q: (B,) levels. Returns (B, outputs, h, w)."""
        # Sines and cosines of log_snr, from slow to fast, let a small network tell nearby noise levels apart (Vaswani et al. 2017).
        angles = log_snr[:, None] * torch.logspace(-1.5, 0.5, 32).to(x.device)                  # (B, 32)
        c = F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.level(q))  # (B, conditioning)
        h, shortcuts = self.stem(x.contiguous(memory_format=torch.channels_last)), []           # (B, C0, h, w)
        for i, stack in enumerate(self.down):
            for block in stack:
                h = block(h, c)                                                                 # (B, Ci, h/2^i, w/2^i)
            if i < len(self.shrink):
                shortcuts.append(h)
                h = self.shrink[i](h)                                                           # (B, C(i+1), h/2^(i+1), w/2^(i+1))
        for i in reversed(range(len(self.up))):
            if i < len(self.grow):
                h = self.grow[i](h) + shortcuts.pop()                                           # (B, Ci, h/2^i, w/2^i)
            for block in self.up[i]:
                h = block(h, c)
        return self.head(h).float()                                                             # (B, outputs, h, w)


HAAR = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / math.sqrt(2)
PLANES = torch.kron(COLOUR, torch.kron(HAAR, HAAR))         # (12, 12), orthonormal


def to_planes(x):
    """Pictures (B, 3, H, W) to 12 planes each, (B, 12, H/2, W/2): every 2x2 square of pixels in an orthonormal basis, three colour axes
    (grey, red - blue, magenta - green) times the four Haar functions (mean, horizontal, vertical, diagonal).

    The denoiser works in these planes: no convolution then runs at full resolution, and what autoencoders lose differs much
    more between the planes than between pixels. White noise stays white noise under a rotation, so diffusion does not notice."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("pc,bchw->bphw", PLANES.to(x), F.pixel_unshuffle(x, 2))             # (B, 12, H/2, W/2)


def from_planes(p):
    """The inverse of `to_planes`: (B, 12, H/2, W/2) to (B, 3, H, W)."""
    with torch.autocast(p.device.type, enabled=False):
        return F.pixel_shuffle(torch.einsum("pc,bphw->bchw", PLANES.to(p), p), 2)               # (B, 3, H, W)


ENERGY_LEVELS = 8   # of the HFD+ map: powers of two of the residual's expected energy, from 2^-4 to 2^3


def residual_energy(x, x_hat, std, block):
    """The HFD+ map (paper, section on HFD+): how much detail the reconstruction lacks, block by block, in 8 levels.

    x, x_hat: (B, 3, H, W); std: (B, 12), the rms residual that the level usually has; block: pixels, a power of two.
    Returns (B, 1, ceil(H / block), ceil(W / block)) integers 0..7: 4 + log2(mean square residual / std^2), rounded."""
    energy = (x - x_hat).square_().mean(dim=1, keepdim=True)                                    # (B, 1, H, W)
    energy = F.avg_pool2d(energy, block, ceil_mode=True)                                        # (B, 1, H/block, W/block)
    ratio = energy / std.square().mean(dim=1)[:, None, None, None]                              # (B, 1, H/block, W/block)
    return (4 + torch.log2(ratio + 1e-9)).round().clamp(0, ENERGY_LEVELS - 1)


@dataclass
class DiffusionConfig:
    """What rebuilds a Diffusion. `levels`: the autoencoder's quality levels; eta: shift of the training schedule;
    objective: "v" (diffusion) or "flow" (rectified flow)."""
    levels: int = 6
    widths: tuple = (48, 96, 192)
    blocks: int = 2
    eta: float = 0.1
    preconditioned: bool = True
    objective: str = "v"


class Diffusion(nn.Module):
    """The conditional denoiser: what it predicts, how it is trained, how it is asked.

    It predicts the velocity v = alpha eps - sigma x (Salimans & Ho 2022), from which both follow:
    x = alpha z - sigma v and eps = sigma z + alpha v. A network that predicts eps has its error in x multiplied by sigma / alpha, one
    that predicts x has its error in eps multiplied by alpha / sigma: each explodes at one end of time. With v neither does.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = UNet(12 + 12 + 2, 24 if config.preconditioned else 12, config.widths, config.blocks, config.levels)
        self.register_buffer("residual_std", torch.full((config.levels, 12), 0.1))              # (Q, 12) rms of x - x_hat

    def closed_form(self, z, x_hat, log_snr, q):
        """What is known of v in closed form: (mean, std, whitened residual), so that v = mean + std * (something of size 1).

        Suppose x ~ N(x_hat, s^2), independently for each pixel, with an s of its own for each plane and level: that is all that
        the autoencoder's errors say. Then d = z - alpha x_hat has variance S = alpha^2 s^2 + sigma^2, and by the rules for Gaussians
            E[v | z] = alpha sigma (1 - s^2) d / S - sigma x_hat,     std[v | z] = s / sqrt(S).
        This is preconditioning (Karras et al. 2022, section 5), centred on x_hat. As the autoencoder starts from a
        DCT, so the denoiser starts from here: with the network still at zero it already is the best denoiser
        that knows s and nothing about pictures. z, x_hat, returns: planes."""
        log_snr, s = log_snr[:, None, None, None], self.residual_std[q][:, :, None, None]       # (B, 1 or 12, 1, 1)
        alpha, sigma = alpha_sigma(log_snr)
        d, S = z - alpha * x_hat, alpha ** 2 * s ** 2 + sigma ** 2
        return alpha * sigma * (1 - s ** 2) * d / S - sigma * x_hat, s / S.sqrt(), d / S.sqrt()

    def velocity(self, z, x_hat, log_snr, q, energy=None):
        """The network's v for z_t = z. z, x_hat, returns: planes (B, 12, h, w); log_snr, q: (B,); energy: HFD+ map, (B, 1, ., .) at any
        resolution, or None. Where it is negative, that picture has none."""
        if energy is None:
            energy = z.new_full((len(z), 1, 1, 1), -1)
        there = (energy >= 0).to(z.dtype)                                                       # (B, 1, ., .)
        hints = F.interpolate(torch.cat([(energy - 4) / 4 * there, there], dim=1), size=z.shape[2:], mode="nearest")  # (B, 2, h, w)
        if not self.config.preconditioned:
            return self.net(torch.cat([z, x_hat, hints], dim=1), log_snr, q)
        mean, std, whitened = self.closed_form(z, x_hat, log_snr, q)                            # (B, 12, h, w) each
        # In truth s is not the same everywhere: large in grass, next to nothing in the sky. Were it known for each pixel, E[v | z]
        # would still be linear in d, only with another slope. So the network gives two numbers for each: a gain that corrects the
        # slope, which in the sky takes all noise out again, and a shift for what a slope cannot say.
        gain, shift = self.net(torch.cat([whitened, x_hat, hints], dim=1), log_snr, q).chunk(2, dim=1)
        return mean + std * (gain * whitened + shift)                                           # (B, 12, h, w)

    def predict_x(self, z, x_hat, log_snr, q, energy=None):
        """The expected picture E[x | z_t, x_hat] = alpha z - sigma v. z, x_hat, returns: pictures (B, 3, H, W); the rest as `velocity`."""
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])
        return alpha * z - sigma * from_planes(self.velocity(to_planes(z), to_planes(x_hat), log_snr, q, energy))

    def forward(self, x, x_hat, q):
        """The training objective: mean squared error on v, t uniform (paper, section on the loss). Returns a scalar.

        x, x_hat: (B, 3, H, W) in [-1, 1]; q: (B,). With the closed form, the error of v is divided by the std that it leaves, so a loss of 1
        means that the network adds nothing. And planes count in proportion to their s: where little is missing, errors are seen little.
        (A flow then differs from diffusion by its schedule alone.)"""
        B = len(x)
        # One uniform number, spread evenly over the batch: every step sees all times (Kingma et al. 2021).
        t = (torch.rand((), device=x.device) + torch.arange(B, device=x.device) / B) % 1        # (B,)
        log_snr = SCHEDULES[self.config.objective](t, self.config.eta)
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])                                # (B, 1, 1, 1)
        # HFD+: half of the pictures come with a map, in blocks of 16, 32 or 64, the others without.
        block = 16 << int(torch.randint(3, ()))
        energy = residual_energy(x, x_hat, self.residual_std[q], block)                         # (B, 1, H/block, W/block), rounded up
        energy = energy.repeat_interleave(block // 2, 2).repeat_interleave(block // 2, 3)[..., :x.shape[2] // 2, :x.shape[3] // 2]
        energy = torch.where(torch.rand(B, 1, 1, 1, device=x.device) < 0.5, energy, -1.0)       # (B, 1, H/2, W/2)
        x, x_hat = to_planes(x), to_planes(x_hat)                                               # (B, 12, H/2, W/2)
        eps = torch.randn_like(x)
        z, v = alpha * x + sigma * eps, alpha * eps - sigma * x                                 # (B, 12, H/2, W/2)
        weight = 1.0
        if self.config.preconditioned:
            s = self.residual_std[q][:, :, None, None]                                          # (B, 12, 1, 1)
            weight = s / s.mean(dim=1, keepdim=True) / self.closed_form(z, x_hat, log_snr, q)[1] ** 2   # (B, 12, 1, 1)
        elif self.config.objective == "flow":
            weight = (alpha + sigma) ** 2                           # see flow_log_snr_at
        return (weight * (self.velocity(z, x_hat, log_snr, q, energy) - v).square()).mean()


# Samplers ---------------------------------------------------------------------------------------------
# Going back from t to a smaller s. Both rules take z = z_t and the denoiser's x, and work in place: z may be large.


def ddpm_step(z, x, log_snr_t, log_snr_s, noise):
    """Ancestral sampling (Ho et al. 2020, in the form of Kingma et al. 2021): draw from
    q(z_s | z_t, x) = N(alpha_s ((1 - c) z_t / alpha_t + c x), sigma_s^2 c),  c = 1 - SNR_t / SNR_s."""
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    c = -torch.expm1(log_snr_t - log_snr_s)             # expm1, since for small steps 1 - ratio would cancel
    z.mul_(float(alpha_s * (1 - c) / alpha_t)).add_(x, alpha=float(alpha_s * c))
    return z.add_(noise(), alpha=float(sigma_s * c.sqrt()))


def ddim_step(z, x, log_snr_t, log_snr_s, noise):
    """DDIM (Song, Meng & Ermon 2021): keep the noise that z_t implies, eps = (z_t - alpha_t x) / sigma_t, and put
    less of it back, z_s = alpha_s x + sigma_s eps. Nothing random after the start; good with few steps."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    ratio = sigma_s / sigma_t
    return z.mul_(float(ratio)).add_(x, alpha=float(alpha_s - ratio * alpha_t))


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpm": ddim_step}


@torch.no_grad()
def sample(predict_x, steps, sampler, schedule, noise, on_step=lambda step: None):
    """Draw x: start from noise at t = 1 and walk to t = 0 in equal steps of t. Returns a tensor of the noise's shape.

    predict_x(z, log_snr): the denoiser; log_snr is a float64 scalar tensor. sampler: "ddpm", "ddim" or "dpm". schedule: t to log_snr, tensors.
    noise(): a fresh standard normal tensor. The last step returns the denoiser's x itself."""
    log_snr = [schedule(torch.tensor(1 - i / steps, dtype=torch.float64)) for i in range(steps + 1)]
    z, x_before = noise(), None
    for i, (log_snr_t, log_snr_s) in enumerate(zip(log_snr, log_snr[1:])):
        x = predict_x(z, log_snr_t)
        on_step(i + 1)
        if i + 1 == steps:
            return x
        target = x
        if sampler == "dpm" and i > 0 and log_snr_t > log_snr[i - 1]:
            # DPM-Solver++(2M) (Lu et al. 2022): DDIM treats x as constant during a step, though the denoiser's x moves
            # with the noise. So continue the line through its last two values to the middle of this step, on the
            # log_snr axis: second order, at the price of remembering one picture. (Where the schedule is clamped, nothing has moved.)
            # What was remembered has then served, and the target takes its place in memory.
            ratio = (log_snr_s - log_snr_t) / (log_snr_t - log_snr[i - 1])
            target = torch.lerp(x, x_before, float(-ratio / 2), out=x_before)                   # x + ratio / 2 (x - x_before)
        z = SAMPLERS[sampler](z, target, log_snr_t, log_snr_s, noise)
        if sampler == "dpm":                # a copy, for predict_x may write into its canvas again
            x_before = x.clone() if x_before is None else x_before.copy_(x)                     # (1, 3, H, W)


# Pictures of any size, tile by tile -------------------------------------------------------------------


def apply_tiled(f, inputs, out, tile=1024, context=160, chosen=lambda row, column: True, batch=1):
    """out[...] = f(*inputs), one tile at a time, so that memory does not grow with the picture.

    Our networks are convolutions without attention and without normalisation over space. Such a network is
    a local rule: an output pixel depends on inputs at most one *receptive field radius* away. So a tile
    evaluated together with `context` pixels around it is, once the context is cropped off again, exactly the
    tile of the whole picture, if context >= radius. The windows end at the picture's own edges, where
    the convolutions pad with zeros just as they would for the whole.

    inputs: tensors (1, C, h, w), each at its own resolution; out: likewise, is written to. All describe the same picture,
    and one of them is the picture itself, its sides multiples of CELL. tile, context: pixels, rounded up to whole cells,
    which keeps the windows aligned with the strides; 160 is enough for the autoencoder with the `blocks` that it has.
    chosen(row, column): whether to visit that tile, counted from 0.
    batch: f is given up to so many windows of one size at once, as (batch, C, ., .): small tiles alone do not fill a GPU.
    """
    tile, context = math.ceil(tile / CELL), math.ceil(context / CELL)                           # in cells, from here on
    rows, cols = (max(t.shape[d] for t in (*inputs, out)) // CELL for d in (-2, -1))

    # The part of t between these cells, a view; n: samples per cell and side, 16 in a picture, 1 in a latent.
    cut = lambda t, n, top, bottom, left, right: t[..., top * n:bottom * n, left * n:right * n]
    by_size = {}                                            # only windows of one size can be stacked
    for top in range(0, rows, tile):
        for left in range(0, cols, tile):
            if chosen(top // tile, left // tile):
                bottom, right = min(top + tile, rows), min(left + tile, cols)
                window = max(top - context, 0), min(bottom + context, rows), max(left - context, 0), min(right + context, cols)
                size = window[1] - window[0], window[3] - window[2]
                by_size.setdefault(size, []).append(((top, bottom, left, right), window))
    samples = out.shape[-2] // rows
    for places in by_size.values():
        for n in range(0, len(places), batch):
            some = places[n:n + batch]
            stacked = [torch.cat([cut(t, t.shape[-2] // rows, *window) for _, window in some]) for t in inputs]
            for result, (core, (y, _, x, _)) in zip(f(*stacked), some):                         # (C, ., .)
                inner = core[0] - y, core[1] - y, core[2] - x, core[3] - x
                cut(out, samples, *core).copy_(cut(result, samples, *inner))
    return out


STEPS, PATCH, CONTEXT = 6, 512, 64          # what is used unless asked otherwise, chosen on photographs that were held out of training
RELATIVE_ETA = 1.5                          # likewise, in units of the residual's standard deviation


def sample_picture(diffusion, x_hat, q, steps=STEPS, sampler=None, seed=0, eta=None, energy=None, patch=PATCH, context=CONTEXT,
                   on_step=lambda step: None, grouped=False, batch=1):
    """Sample a whole picture of any size, patch by patch, given x_hat (1, 3, H, W), sides multiples of 16.

    The patches move in step: each denoising step visits all of them, evaluates every one with `context` pixels around it, and keeps its
    centre; then the whole canvas goes on to the next noise level. With the U-Net's receptive field radius as context this *is* sampling the
    whole picture, at the memory of one patch; with none, seams show. All noise is drawn on the CPU for the canvas at once, so it depends on
    `seed` alone.

    grouped: the paper's way, for it may not rely on a local network. Four groups of patches that do not touch take turns, each going all the
    way from noise to picture. Elsewhere the denoiser's x is replaced by what earlier groups made, or by x_hat where nothing is made yet, so
    that z_t there has the right noise level. An approximation: early groups cannot know what late ones will do.

    sampler: None for "dpm", or for a flow "ddim", which is Euler's step. energy: the HFD+ map at one value per CELL, (1, 1, H/16, W/16), or
    None. eta: shift of the schedule; None for RELATIVE_ETA times the residual's standard deviation at level q, so that the noise is of the
    size of what is missing. patch, context: pixels. batch: patches that the network is given at once. Returns (1, 3, H, W) in [-1, 1]."""
    sampler = sampler or {"v": "dpm", "flow": "ddim"}[diffusion.config.objective]
    eta = eta or RELATIVE_ETA * diffusion.residual_std[q].square().mean().sqrt().item()
    generator, device = torch.Generator().manual_seed(seed), x_hat.device
    level = torch.tensor([q], device=device)
    given = [x_hat] if energy is None else [x_hat, energy]
    canvas = torch.empty_like(x_hat)                                                            # (1, 3, H, W)
    noise = lambda: torch.randn(x_hat.shape, generator=generator).to(device)
    schedule = lambda t: SCHEDULES[diffusion.config.objective](t, eta)

    def predict_x(z, log_snr, chosen=lambda row, column: True):
        """The denoiser on the whole canvas (1, 3, H, W), patch by patch, or on the chosen patches."""
        log_snr = log_snr.to(x_hat.dtype).to(device)[None]                                      # (1,), the same for all windows
        denoise = lambda z, x_hat, energy=None: diffusion.predict_x(z, x_hat, log_snr, level, energy)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
            return apply_tiled(denoise, [z, *given], canvas, patch, context, chosen, batch)

    if not grouped:
        return sample(predict_x, steps, sampler, schedule, noise, on_step).clamp_(-1, 1)
    known = x_hat.clone()
    for n, group in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        def predict_group(z, log_snr):
            """The denoiser on this group's patches; everywhere else, what is known."""
            canvas.copy_(known)
            return predict_x(z, log_snr, lambda row, column: (row % 2, column % 2) == group)
        report = lambda step: on_step((n * steps + step) / 4)
        known.copy_(sample(predict_group, steps, sampler, schedule, noise, report))
    return known.clamp_(-1, 1)


# Housekeeping: checkpoints, devices, errors -----------------------------------------------------------

FORMAT = "hfd checkpoint 3"
ALLOWED = r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_tensor_v2|_codecs encode"      # by a checkpoint's pickle
CPU_FEATURES = getattr(torch.cpu, "get_capabilities", dict)()         # what torch knows of this machine's; older versions know nothing


class HFDError(Exception):
    """Something the user can put right. Its text is one line: what is wrong, with which file, what to do."""


def printable(text):
    """The text in one line that steers no terminal: names of files and strangers' checkpoints may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run(main):
    """Call main(); turn what a user can put right into one line and exit status 1, Ctrl-C into 130."""
    try:
        main()
    except (HFDError, OSError) as error:
        sys.exit(printable(f"error: {error}"))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in ("out of memory", "allocate memory", "ALLOC_FAILED")):
            raise
        sys.exit("error: the memory is full. Ask for less at once (--batch, --patch, --crop, --megapixels); if it is a GPU's, take --device cpu")
    except KeyboardInterrupt:
        sys.exit(130)


def write_atomically(path, write):
    """Call write(f) on a temporary file beside `path`, then rename it: `path` is always complete, old or new. HFDError if the system
    refuses."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # where the disk is full, torch.save fails once more, over its own end
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno:      # the system's own, not Pillow's
            raise HFDError(f"{path}: cannot be written ({cause.strerror}); make room, or name another place") from None
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@dataclass
class Model:
    """A loaded checkpoint. `diffusion` is None after stage 1; `identity`: 4 bytes that name the autoencoder; `training`: what train.py
    needs to resume, unless it was stripped off."""
    autoencoder: Autoencoder
    diffusion: nn.Module
    tables: Tables
    recipe: dict
    identity: bytes
    training: dict = None

    @property
    def device(self):
        """Where its weights are."""
        return self.autoencoder.log_step.device


def fingerprint(*tensor_dicts):
    """SHA-256, as bytes, over the values of all tensors in the dictionaries, in order."""
    digest = hashlib.sha256()
    for tensors in tensor_dicts:
        for tensor in tensors.values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()


def pack(autoencoder, tables, diffusion, recipe, half=False):
    """The dictionary that a checkpoint file holds: configs, weights, integer tables, how they were made, and a digest that
    tells damage. With `half`, the networks' matrices are stored as float16; steps, prior and tables never are."""
    def part(module):
        """Configuration and weights of one network, or nothing of none."""
        return {"config": asdict(module.config) if module else {}, "weights": {
            name: t.detach().cpu().half() if half and name.endswith("weight") else t.detach().cpu().clone()
            for name, t in (module.state_dict().items() if module else ())}}

    packed = {"format": FORMAT, "recipe": recipe, "tables": vars(tables), "autoencoder": part(autoencoder), "diffusion": part(diffusion)}
    return packed | {"digest": fingerprint(packed["tables"], packed["autoencoder"]["weights"], packed["diffusion"]["weights"])}


def is_trap(pickled):
    """Whether a pickle, bytes, is a trap: forty lists, each of which holds the one before it twice, are 300 bytes, and who goes through the
    last (or hashes a tuple made so) never comes back; tuples nested a million deep crash Python; and torch itself would call what makes
    gigabytes out of nothing. What train.py writes repeats three, has about 3,000 tuples, and calls nothing but what is ALLOWED."""
    containers, here, repeated, tuples = set(), False, 0, 0     # slots of the pickle's memory; whether the topmost value is a container
    for operation, value, _ in pickletools.genops(pickled):     # (integers beyond 2^53 can be made to have one hash, all of them)
        if "GLOBAL" in operation.name and not re.fullmatch(ALLOWED, str(value)) or isinstance(value, int) and abs(value) > 2 ** 53:
            return True
        # A codec counts as a container: each time it is called it may double what it is given.
        again = value == "_codecs encode" or operation.name.endswith("GET") and value in containers
        repeated, tuples = repeated + again, tuples + ("TUPLE" in operation.name)
        if operation.stack_after:
            here = again or any(kind in operation.name for kind in ("TUPLE", "LIST", "DICT", "SET", "APPEND", "REDUCE", "BUILD", "OBJ"))
        elif operation.name.endswith("PUT") and here:
            containers.add(value)
    return repeated > 4 or tuples > 20_000


def read_checkpoint(path):
    """The dictionary in a checkpoint file. HFDError if it is not one; nothing in the file is ever executed."""
    if not os.path.isfile(path):
        raise HFDError(f"{path}: no such checkpoint. Train one (python train.py --help) or name another")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.lower(): member for member in archive.infolist()}
            # torch must find what is looked at here: from the first byte on, and each name once. It compresses nothing; what unpacks to more
            # than it is, is a trap.
            if min(member.header_offset for member in members.values()) > 0 or len(members) < len(archive.infolist()) or sum(
                    member.file_size for member in members.values()) > os.path.getsize(path):
                raise ValueError
            pickles = [member for name, member in members.items() if name.endswith(".pkl")]         # 72,000 bytes at most, from train.py
            if max(member.file_size for member in pickles) > 500_000 or archive.testzip() or any(is_trap(archive.read(member)) for member in pickles):
                raise ValueError
        with warnings.catch_warnings(action="ignore"):      # torch's remarks on foreign pickles; they are refused anyway
            packed = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # the many ways in which a damaged or foreign file can fail to unpickle
        raise HFDError(f"{path}: not a checkpoint that can be read safely ({type(error).__name__})") from None
    if type(packed) is not dict or packed.get("format") != FORMAT:
        raise HFDError(f"{path}: not an HFD checkpoint, or one of another version")
    return packed


@contextlib.contextmanager
def refusing_damage(path):
    """Turn whatever a damaged or forged checkpoint can raise, once it is read, into one line."""
    try:
        yield
    except torch.OutOfMemoryError:      # a RuntimeError too, but no fault of the file
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise HFDError(f"{path}: the checkpoint is incomplete or damaged ({' '.join(str(error).split())[:120]})") from None


def plain(value):
    """Whether this is a text or a number of ordinary size: what a checkpoint's settings and records are made of."""
    return isinstance(value, str) and len(value) < 10 ** 5 or isinstance(value, float) or isinstance(value, int) and abs(value) < 2 ** 53


def rebuild(kind, config, weights):
    """The network kind(config) with these weights, or ValueError if they are not what that configuration asks for. It
    is built first on torch's device "meta", where tensors have shapes and no memory: a forged configuration may ask for any size."""
    # Every stage and every block has weights; a configuration of more of them is a forgery that would take forever to build, even there.
    for setting in vars(config).values():
        if not all(map(plain, setting if isinstance(setting, (tuple, list)) else [setting])):
            raise ValueError("its configuration cannot be read")
    parts = 1 + np.broadcast_to(np.array(config.blocks, float), len(config.widths))             # the least that each stage has
    if min(parts) < 1 or sum(parts) > len(weights):
        raise ValueError("its configuration cannot be meant")
    with torch.device("meta"):
        asked = kind(config).state_dict()
    if {name: t.shape for name, t in asked.items()} != {name: t.shape for name, t in weights.items()}:
        raise ValueError("its weights do not fit its configuration")
    module = kind(config)
    module.load_state_dict(weights)
    return module


def load_model(path, device="cpu"):
    """Rebuild a Model from a checkpoint file, without flags: it carries its configuration. HFDError if it cannot be used."""
    packed = read_checkpoint(path)
    with refusing_damage(path):
        tables, recipe = Tables(**packed["tables"]), packed["recipe"]
        first, second = packed["autoencoder"], packed["diffusion"]
        parts = packed["tables"], recipe, *recipe.values(), first, second, *first.values(), *second.values()
        if not all(type(part) is dict for part in parts):   # other kinds of dictionary can be made to show one thing and hold another
            raise ValueError("its parts are not dictionaries")
        # By a stride of zero, or by sharing, a few bytes in a forged file can stand for terabytes.
        if sum(t.nbytes for part in (packed["tables"], first["weights"], second["weights"]) for t in part.values()) > os.path.getsize(path):
            raise ValueError("not all of its tensors are stored in full")
        texts = [*recipe, *(text for part in recipe.values() for item in part.items() for text in item)]
        if len(texts) > 1000 or not all(map(plain, texts)):
            raise ValueError("its recipe cannot be read")
        if packed["digest"] != fingerprint(packed["tables"], first["weights"], second["weights"]):
            raise ValueError("its digest does not match")
        autoencoder, diffusion = rebuild(Autoencoder, AutoencoderConfig(**first["config"]), first["weights"]), None
        fits = tables.validate().octaves.shape == autoencoder.log_step.shape                    # (Q, M) both
        if second["weights"]:                               # there are none before stage 2
            diffusion = rebuild(Diffusion, DiffusionConfig(**second["config"]), second["weights"])
            fits = fits and diffusion.config.levels == len(autoencoder.log_step) and diffusion.config.objective in SCHEDULES
        if not fits:
            raise ValueError("its parts do not belong together")
        identity = fingerprint(autoencoder.state_dict(), packed["tables"])[:4]
    for module in filter(None, (autoencoder, diffusion)):
        module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return Model(autoencoder, diffusion, tables, recipe, identity, packed.get("training"))


def pick_device(name="auto"):
    """The device that `name` says, or for "auto" the fastest there is: CUDA, then MPS, then CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name).cpu()                   # which "meta", where nothing has values, cannot do
    except (RuntimeError, AssertionError):
        raise HFDError(f"device '{name}' cannot be used here; try --device cpu") from None
    return torch.device(name)


def clock(device):
    """Seconds, once the device has done what it was asked: a GPU answers before it has worked."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def fast_bf16(device):
    """Whether bfloat16 is worth it: on GPUs of the last years, and on CPUs that are faster in it than in float32. AMD's with AVX-512 are;
    Intel's without AMX take almost twice as long. (With AMX they should be faster; that was not measured.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = CPU_FEATURES if device.type == "cpu" else {}
    return bool(known.get("amx_bf16") or known.get("avx512_bf16") and "AMD" in known.get("cpu_name", ""))


def hardware(device):
    """What this runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = CPU_FEATURES.get("cpu_name", platform.processor())
    return f"{device.type.upper()}, {name}, {torch.get_num_threads()} threads" + (", bfloat16" if fast_bf16(device) else "")


def peak_memory(device):
    """The most memory that this process has held so far, in words."""
    try:                                # Linux: the process's own. Its getrusage counts whoever started the process, too
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2 ** 20
    except (OSError, StopIteration):    # in bytes on a Mac
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
    on_gpu = f", on the GPU {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB" if device.type == "cuda" else ""
    return f"peak memory {peak:.2f} GiB{on_gpu}"
