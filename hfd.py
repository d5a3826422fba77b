"""Pictures: an autoencoder spends the bits, and a diffusion model draws what they left out.

A small, complete implementation of "High-Fidelity Image Compression with Score-based Generative
Models" (Hoogeboom, Agustsson, Mentzer, Versari, Toderici, Theis 2023, arXiv 2305.18231), called
HFD: High-Fidelity Diffusion. Two stages:

    x --encoder--> y --round--> k --coder--> file --> k --decoder--> x_hat --diffusion--> x_sample

1. An autoencoder, trained for rate + lambda * MSE and nothing else. Its picture x_hat is right but
   blurry: the best guess under squared error is an average over all that the bits leave open.
2. A conditional diffusion model, trained to sample x given x_hat. It costs no bits at all.

Symbols are the paper's: x image, y latent, x_hat reconstruction, t in [0, 1] time, z_t noisy image,
eps noise, v velocity, alpha_t and sigma_t the scales of signal and noise, log_snr the logarithm of
alpha_t^2 / sigma_t^2. Pictures are (B, 3, H, W), RGB, in [-1, 1]. A quality level q counts from 0
(to users: from 1). It is a tensor (B,) in the networks, for a batch mixes levels, and an int where
one picture is coded.
"""
import functools
import hashlib
import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, fields
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import entropy

# Stage 1: the autoencoder -------------------------------------------------------------------------
CELL = 16   # pixels per latent sample and side. Every total stride divides it; pictures are padded.


@dataclass
class AutoencoderConfig:
    """What rebuilds an Autoencoder. lambdas: for each quality level the price of squared error, in
    bits per pixel for one unit of MSE on the scale 0..255; widths, blocks: at 1/2, 1/4, 1/8 and
    1/16 of the resolution; prior: "factorized" or "context" (Parts I and II of entropy.py)."""
    lambdas: tuple = (0.0004, 0.0009, 0.0019, 0.0042, 0.0091, 0.02)
    latents: int = 320
    widths: tuple = (32, 64, 128, 160)
    blocks: tuple = (0, 1, 2, 2)
    prior: str = "context"


# Orthonormal axes of (R, G, B): grey, red - blue, magenta - green. Most energy is in the first.
COLOUR = F.normalize(torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64))


def transform_basis(count):
    """The `count` most important functions of an orthonormal transform, (count, 3, 32, 32).

    JPEG rotates the colours and expands blocks of pixels in cosines, which puts nearly all energy
    into few coefficients. Blocks show at low rates; so here functions twice as wide overlap by half
    (lapped transform; Malvar & Staelin 1989): even and odd cosines, subtracted, nearly vanish at
    one end, and with their mirror image in the next block they fade in and out. One more rotation
    packs the energy of pixels whose neighbours have a correlation of 0.95."""
    n = torch.arange(CELL, dtype=torch.float64)
    dct = torch.cos(math.pi / CELL * (n + 0.5) * n[:, None]) * math.sqrt(2 / CELL)
    dct[0] /= math.sqrt(2)                                  # (16, 16): frequency, pixel
    fade = (dct[0::2] - dct[1::2]) / 2                                              # (8, 16)
    lapped = torch.cat([torch.cat([fade, sign * fade.flip(1)], 1) for sign in (1, -1)])   # (16, 32)
    wide = torch.arange(2 * CELL, dtype=torch.float64)
    covariance = 0.95 ** (wide - wide[:, None]).abs()                               # (32, 32)
    energy, rotation = torch.linalg.eigh(lapped @ covariance @ lapped.T)           # (16,), (16, 16)
    lapped = rotation.T @ lapped                                                    # (16, 32)
    # In two dimensions functions are products, and so are energies. Colour has a twentieth.
    importance = torch.tensor([1, 0.05, 0.05])[:, None, None] * energy[:, None] * energy
    chosen = importance.flatten().argsort(descending=True)[:count]                  # of (3, 16, 16)
    c, u, v = chosen // CELL ** 2, chosen // CELL % CELL, chosen % CELL             # (count,) each
    return torch.einsum("mc,mi,mj->mcij", COLOUR[c], lapped[u], lapped[v]).float()


class ResidualBlock(nn.Module):
    """x + conv(relu(gain * conv(relu(x)))), with x (B, C, h, w). The gain, one per channel and
    level, is all that tells the transforms how coarsely this picture is quantized."""

    def __init__(self, width, levels):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(levels, width))

    def forward(self, x, q):
        """x: (B, C, h, w); q: (B,) levels. Returns the shape of x."""
        gain = self.gain[q][:, :, None, None].to(x.dtype)                           # (B, C, 1, 1)
        return x + self.conv2(F.relu(self.conv1(F.relu(x)) * gain))                 # (B, C, h, w)


class Transform(nn.Module):
    """A path `linear` plus a path `deep`. The first is a convolution that starts as a transform
    codec; the second, after ELIC (He et al. 2022), starts at zero. Its strides are 2x2 pixels that
    become four times the channels, or back: nothing runs at full resolution."""

    def forward(self, x, q):
        """x: (B, C, ., .), as both paths take it; q: (B,). Returns float32."""
        x = h = x.contiguous(memory_format=torch.channels_last)                     # (B, C, ., .)
        for layer in self.deep:
            h = layer(h, q) if isinstance(layer, ResidualBlock) else layer(h)
        return self.linear(x).float() + h.float()


def zeroed(layer):
    """The layer, with its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Analysis(Transform):
    """Picture x (B, 3, H, W) in [-1, 1], sides multiples of 16, to latent y (B, M, H/16, W/16)."""

    def __init__(self, config, basis):
        super().__init__()
        # A 32x32 convolution at stride 16. With 16x16 blocks laid into channels it is a 2x2 one.
        conv = zeroed(nn.Conv2d(3 * CELL ** 2, config.latents, 2))
        conv.weight.data.copy_(F.pixel_unshuffle(basis, CELL))
        self.linear = nn.Sequential(nn.ZeroPad2d(CELL // 2), nn.PixelUnshuffle(CELL), conv)
        widths, layers = (3, *config.widths), []
        for a, b, blocks in zip(widths, widths[1:], config.blocks):
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 3, padding=1)]
            layers += [ResidualBlock(b, len(config.lambdas)) for _ in range(blocks)]
        layers += [nn.ReLU(), zeroed(nn.Conv2d(widths[-1], config.latents, 1))]
        self.deep = nn.ModuleList(layers)


class Synthesis(Transform):
    """Dequantized latent y_hat (B, M, h, w) to x_hat (B, 3, 16 h, 16 w), not clamped. The linear
    path has the same basis, for an orthonormal matrix is inverted by its transpose."""

    def __init__(self, config, basis):
        super().__init__()
        # Transposing a convolution exchanges its channels and turns its kernel around.
        conv = zeroed(nn.Conv2d(config.latents, 3 * CELL ** 2, 2, padding=1))
        conv.weight.data.copy_(F.pixel_unshuffle(basis, CELL).transpose(0, 1).flip(2, 3))
        self.linear = nn.Sequential(conv, nn.PixelShuffle(CELL), nn.ZeroPad2d(-CELL // 2))
        widths = (*config.widths[::-1], 3)
        layers = [nn.Conv2d(config.latents, widths[0], 3, padding=1)]
        for a, b, blocks in zip(widths, widths[1:], config.blocks[::-1]):
            layers += [ResidualBlock(a, len(config.lambdas)) for _ in range(blocks)]
            layers += [nn.Conv2d(a, 4 * b, 3, padding=1), nn.PixelShuffle(2)]
        zeroed(layers[-2])
        self.deep = nn.ModuleList(layers)


class Autoencoder(nn.Module):
    """Transforms, quantization steps and prior. The paper trains one per rate. This one serves the
    whole curve: each quality level has a quantization step of its own per channel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        with torch.device("cpu"):           # as load_part builds the rest where nothing has values
            basis = transform_basis(config.latents)                                 # (M, 3, 32, 32)
            lambdas = torch.tensor(config.lambdas, dtype=torch.float32)             # (Q,)
        Q, M = len(config.lambdas), config.latents
        self.analysis, self.synthesis = Analysis(config, basis), Synthesis(config, basis)
        self.prior = entropy.PRIORS[config.prior](M, Q)
        # At high rate, a coefficient quantized with step d costs h - log2 d bits (h: differential
        # entropy) and has the squared error d^2 / 12. Rate + price * error is least where d^2 ln 2
        # = 6 / price. The price is lambda, for x in units of 127.5 and the mean of three channels.
        log_step = 0.5 * torch.log(6 / (lambdas * 127.5 ** 2 / 3 * math.log(2)))    # (Q,)
        self.log_step = nn.Parameter(log_step[:, None].repeat(1, M))                # (Q, M)
        self.offset = nn.Parameter(torch.zeros(Q, M))                               # see dequantize
        self.register_buffer("lambdas", lambdas, persistent=False)                  # (Q,)

    def step(self, q):
        """The quantization steps of levels q (B,): (B, M, 1, 1)."""
        return self.log_step[q].exp()[:, :, None, None]

    def dequantize(self, k, q):
        """Integers k (B, M, h, w) at levels q (B,) to y_hat. Not to the middle of each bin: small
        values are likelier than large ones, so move by a learned share of a step towards zero."""
        return self.step(q) * (k - self.offset[q][:, :, None, None] * k.sign())     # (B, M, h, w)

    def forward(self, x, q):
        """The training objective, rate + lambda * MSE (Balle et al. 2017). x: (B, 3, H, W), sides
        multiples of 16; q: (B,). Returns (B,) tensors: `loss`, `bpp` (estimated) and `mse` (on the
        scale 0..255)."""
        step, lambdas = self.step(q), self.lambdas[q]
        # Rounding has no gradient. For the rate, uniform noise as wide as a step stands in for it:
        # the noisy latent's density is, at every integer, exactly that bin's probability. But the
        # decoder must see what it will see in earnest, rounded values; there the gradient passes
        # straight through. So the rate pushes steps to be wide, the error to be narrow. (Noise is
        # dearer than rounding: at low rates this estimate lies well above the bits of a file.)
        u = self.analysis(x, q) / step                                              # (B, M, h, w)
        noisy = u + torch.rand_like(u) - 0.5                                        # (B, M, h, w)
        rounded = u + (u.round() - u).detach()                                      # (B, M, h, w)
        bits = self.prior.bits(noisy, rounded, step, q).sum(dim=(1, 2, 3))          # (B,)
        bpp = bits / (x.shape[2] * x.shape[3])                                      # (B,) rate
        x_hat = self.synthesis(self.dequantize(rounded, q), q)                      # (B, 3, H, W)
        mse = (x_hat - x).square().mean(dim=(1, 2, 3)) * 127.5 ** 2                 # (B,) error
        # The sum grows with lambda: make levels count more alike.
        weight = (self.lambdas.mean() / lambdas).sqrt()                             # (B,)
        return {"loss": weight * (bpp + lambdas * mse), "bpp": bpp, "mse": mse}

    def encode(self, x, q):
        """Picture (1, 3, H, W) in [-1, 1], sides multiples of 16, to its latent at level q, an int:
        k (1, M, H/16, W/16), int32. HFDError if a badly trained encoder makes no such numbers."""
        level = torch.tensor([q], device=x.device)
        u = x.new_empty(1, self.config.latents, x.shape[2] // CELL, x.shape[3] // CELL)
        apply_tiled(lambda window: self.analysis(window, level) / self.step(level), [x], u)
        if not u.abs().max() < 2 ** 29:                     # also if it is not a number
            raise HFDError("training has failed: no file can hold this latent; use a lower --lr")
        return u.round().int()

    def decode(self, k, q):
        """Latent k (1, M, h, w) at level q, an int, to x_hat (1, 3, 16 h, 16 w) in [-1, 1]."""
        level = torch.tensor([q], device=k.device)
        x_hat = self.log_step.new_empty(1, 3, CELL * k.shape[2], CELL * k.shape[3])
        apply_tiled(lambda part: self.synthesis(self.dequantize(part, level), level), [k], x_hat)
        return x_hat.clamp_(-1, 1)


# Stage 2: noise, and a network that removes it ----------------------------------------------------
# Diffusion (Sohl-Dickstein et al. 2015; Ho et al. 2020) destroys a picture gradually and learns to
# go back: z_t = alpha_t x + sigma_t eps with eps ~ N(0, I) and alpha_t^2 + sigma_t^2 = 1. All that
# matters about t is log_snr, which falls from clean (t = 0) to pure noise (t = 1): the *schedule*.


def alpha_sigma(log_snr):
    """(alpha, sigma): alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr)."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def log_snr_at(t, eta):
    """The shifted cosine schedule: log_snr(t; eta) = -2 log(eta tan(pi t / 2)), within +-15.

    eta = 1 is the cosine schedule (Nichol & Dhariwal 2021, without their offset). The paper takes
    eta = 0.5, *less* noise: x_hat tells the structure, and little hides the fine detail that is
    left to decide. (Text to image shifts the other way.) t: tensor in [0, 1]. Returns its shape."""
    # tan = sin / cos, and the cosine is sin(pi (1 - t) / 2): itself it rounds below 0 at t = 1.
    noise, signal = torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * (1 - t))
    return (-2 * torch.log(eta * noise / signal)).clamp(-15, 15)


class ChannelNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the channels of each pixel of x (B, C, h, w). Group
    norm, the usual choice, averages over all pixels: no patch could be computed by itself."""

    def forward(self, x):
        """Returns the shape of x, each pixel with mean 0 and variance 1."""
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


class UNetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, for x (B, C, h, w). In between, c (B, features), which
    tells noise and level, sets a scale and a shift per channel (FiLM, Perez et al. 2018)."""

    def __init__(self, width, features):
        super().__init__()
        self.norm = ChannelNorm()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(features, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        zeroed(self.conv2)                                  # so it starts as the identity

    def forward(self, x, c):
        """Returns the shape of x."""
        scale, shift = self.film(c)[:, :, None, None].chunk(2, dim=1)            # (B, C, 1, 1) each
        h = self.conv1(F.silu(self.norm(x)))                                        # (B, C, h, w)
        h = torch.addcmul(shift, self.norm(h), 1 + scale)                           # (B, C, h, w)
        return x + self.conv2(F.silu(h))                                            # (B, C, h, w)


class UNet(nn.Module):
    """A compact U-Net (Ronneberger et al. 2015), with additive shortcuts. No attention, and nothing
    else that mixes distant pixels: see `apply_tiled` for what that buys."""

    def __init__(self, inputs, outputs, config):
        super().__init__()
        widths, features = config.widths, 128               # numbers that tell noise and level
        self.level = nn.Embedding(config.levels, features)
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, features))
        frequencies = torch.logspace(-1.5, 0.5, 32, device="cpu")                   # slow to fast
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.stem = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down, self.up, self.shrink, self.grow = (nn.ModuleList() for _ in range(4))
        for way in self.down, self.up:
            for width, count in zip(widths, config.blocks):
                way.append(nn.ModuleList(UNetBlock(width, features) for _ in range(count)))
        for a, b in zip(widths, widths[1:]):
            self.shrink.append(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1)))
            self.grow.append(nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)))
        head = zeroed(nn.Conv2d(widths[0], outputs, 3, padding=1))
        self.head = nn.Sequential(ChannelNorm(), head)

    def forward(self, x, log_snr, q):
        """x: (B, inputs, h, w); log_snr, q: (B,). Returns (B, outputs, h, w), float32."""
        # Slow and fast waves tell a small network nearby noise levels apart (Vaswani et al. 2017).
        angles = log_snr[:, None] * self.frequencies                                # (B, 32)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)                      # (B, 64)
        c = F.silu(self.embed(waves) + self.level(q))                               # (B, 128)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))              # (B, C0, h, w)
        shortcuts = []
        for blocks, shrink in zip(self.down, self.shrink):
            for block in blocks:
                h = block(h, c)                                                  # (B, Ci, h/2^i, .)
            shortcuts.append(h)
            h = shrink(h)                                                        # (B, C(i+1), ., .)
        for block in (*self.down[-1], *self.up[-1]):
            h = block(h, c)                                                      # at the bottom
        for blocks, grow in reversed([*zip(self.up, self.grow)]):
            h = grow(h) + shortcuts.pop()                                        # (B, Ci, h/2^i, .)
            for block in blocks:
                h = block(h, c)                                                  # (B, Ci, h/2^i, .)
        return self.head(h).float()                                             # (B, outputs, h, w)


@dataclass
class DiffusionConfig:
    """What rebuilds a Diffusion. levels: quality levels; widths, blocks: of the U-Net at 1/2, 1/4,
    ... of the resolution; eta: of training; kind: of DENOISERS; objective: of SCHEDULES."""
    levels: int = 6
    widths: tuple = (48, 96, 192)
    blocks: tuple = (2, 2, 2)
    eta: float = 0.1
    kind: str = "plus"
    objective: str = "v"


class Diffusion(nn.Module):
    """The conditional denoiser, plain v-prediction: what it predicts, how it is trained.

    It predicts the velocity v = alpha eps - sigma x (Salimans & Ho 2022). From v follow both:

        x = alpha z - sigma v,   eps = sigma z + alpha v

    A network that predicts eps has its error in x multiplied by sigma / alpha, one that predicts x
    its error in eps by alpha / sigma: each explodes at one end of time. With v neither does."""
    inputs, outputs = 24, 12          # planes of the U-Net: 2x2 pixels of three colours make twelve

    def __init__(self, config):
        super().__init__()
        self.config, self.schedule = config, SCHEDULES[config.objective]
        self.net = UNet(self.inputs, self.outputs, config)
        # (Q, 12) the rms of x - x_hat at each level in each plane (see to_planes): measured first.
        self.register_buffer("residual_std", torch.full((config.levels, 12), 0.1))

    def velocity(self, z, log_snr, q, x_hat):
        """The network's v, in the shape of z_t = z and x_hat, (B, 3, H, W); log_snr, q: (B,)."""
        # 2x2 squares of pixels become channels, so that no convolution runs at full resolution.
        planes = F.pixel_unshuffle(torch.cat([z, x_hat], dim=1), 2)              # (B, 24, H/2, W/2)
        return F.pixel_shuffle(self.net(planes, log_snr, q), 2)                     # (B, 3, H, W)

    def predict_x(self, z, log_snr, q, *given):
        """E[x | z_t, given] = alpha z - sigma v, (B, 3, H, W). given: x_hat, and the map if any."""
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])                 # (B, 1, 1, 1) each
        return alpha * z - sigma * self.velocity(z, log_snr, q, *given)

    def diffuse(self, x):
        """Draw times and noise for a batch x (B, 3, H, W): (log_snr (B,), z_t, v)."""
        # One random number, spread evenly: each batch sees all times (Kingma et al. 2021).
        B = len(x)
        t = (torch.rand((), device=x.device) + torch.arange(B, device=x.device) / B) % 1    # (B,)
        log_snr = self.schedule(t, self.config.eta)                                 # (B,)
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])                 # (B, 1, 1, 1) each
        eps = torch.randn_like(x)                                                   # (B, 3, H, W)
        return log_snr, alpha * x + sigma * eps, alpha * eps - sigma * x

    def forward(self, x, q, x_hat):
        """The training objective, a scalar, as {"loss": it}: mean squared error on v, t uniform. x,
        x_hat: (B, 3, H, W) in [-1, 1]; q: (B,)."""
        log_snr, z, v = self.diffuse(x)
        return {"loss": (self.velocity(z, log_snr, q, x_hat) - v).square().mean()}


# Sampling: from noise back to a picture -----------------------------------------------------------
def ddpm_step(z, x, log_snr_t, log_snr_s, noise):
    """Ancestral sampling, from t to a smaller s (Ho et al. 2020, as in Kingma et al. 2021): draw
    z_s from

        q(z_s | z_t, x) = N(alpha_s ((1 - kappa) z_t / alpha_t + kappa x), sigma_s^2 kappa),
        kappa = 1 - SNR_t / SNR_s

    z: z_t, overwritten, for it may be large; x: the denoiser's; noise(): a standard normal."""
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    kappa = -torch.expm1(log_snr_t - log_snr_s)     # expm1: for small steps 1 - ratio would cancel
    z.mul_(float(alpha_s * (1 - kappa) / alpha_t)).add_(x, alpha=float(alpha_s * kappa))  # the mean
    return z.add_(noise(), alpha=float(sigma_s * kappa.sqrt()))                     # + std * noise


@torch.no_grad()
def sample_loop(predict_x, log_snr, step, noise):
    """Draw x: from noise at t = 1 walk to t = 0.

    log_snr: float64 (steps + 1,), of all times on the way; predict_x(z, log_snr): the denoiser, at
    one of them; step: ddpm_step or another one; noise(): a fresh standard normal tensor. Returns
    the last x of the denoiser, in the shape of noise()."""
    z = noise()
    for log_snr_t, log_snr_s in zip(log_snr, log_snr[1:]):
        x = predict_x(z, log_snr_t)
        z = step(z, x, log_snr_t, log_snr_s, noise)
    return x


# Extension 1: a closed-form start -----------------------------------------------------------------
HAAR = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / math.sqrt(2)
PLANES = torch.kron(COLOUR, torch.kron(HAAR, HAAR))         # (12, 12), orthonormal
planes_on = functools.lru_cache(8)(PLANES.to)               # (device, dtype), uploaded once


def to_planes(x):
    """Pictures (B, 3, H, W) to 12 planes (B, 12, H/2, W/2): 2x2 pixels in an orthonormal basis, the
    axes of COLOUR times four Haar functions (mean, horizontal, vertical, diagonal). What is lost
    differs much between them; and white noise, rotated, is white noise."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("pc,bchw->bphw", planes_on(x.device, x.dtype), F.pixel_unshuffle(x, 2))


def from_planes(p):
    """The inverse of `to_planes`: (B, 12, H/2, W/2) to (B, 3, H, W)."""
    with torch.autocast(p.device.type, enabled=False):
        return F.pixel_shuffle(torch.einsum("pc,bphw->bchw", planes_on(p.device, p.dtype), p), 2)


class Preconditioned(Diffusion):
    """v-prediction from a closed-form start (Karras et al. 2022, section 5, here around x_hat).

    Suppose x ~ N(x_hat, s^2), independently, with an s of its own for each plane and level. Then
    d = z - alpha x_hat has the variance S = alpha^2 s^2 + sigma^2, and by the rules for Gaussians

        E[v | z] = alpha sigma (1 - s^2) d / S - sigma x_hat,     std[v | z] = s / sqrt(S)

    The network adds to the first, in units of the second. While it is still at zero, this is
    already the best denoiser that knows s and nothing about pictures."""
    outputs = 24

    def spread(self, log_snr, q):
        """(alpha, sigma, s, S) of the docstring above, (B, 12, 1, 1) or (B, 1, 1, 1) each."""
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])                 # (B, 1, 1, 1) each
        s = self.residual_std[q][:, :, None, None]                                  # (B, 12, 1, 1)
        return alpha, sigma, s, alpha ** 2 * s ** 2 + sigma ** 2

    def velocity(self, z, log_snr, q, x_hat, *hints):
        """As in Diffusion. hints: more planes (B, ., H/2, W/2) for the network to see."""
        z, x_hat = to_planes(z), to_planes(x_hat)                                # (B, 12, H/2, W/2)
        alpha, sigma, s, S = self.spread(log_snr, q)
        d = z - alpha * x_hat                                                    # (B, 12, H/2, W/2)
        mean = alpha * sigma * (1 - s ** 2) * d / S - sigma * x_hat              # (B, 12, H/2, W/2)
        whitened = d / S.sqrt()                                                  # (B, 12, H/2, W/2)
        # In truth s is large in grass, next to nothing in the sky. Were it known for each pixel,
        # E[v | z] would still be linear in d, with another slope. So the network gives two numbers
        # for each: a gain that corrects the slope, and a shift for what a slope cannot say.
        planes = torch.cat([whitened, x_hat, *hints], dim=1)                 # (B, inputs, H/2, W/2)
        gain, shift = self.net(planes, log_snr, q).chunk(2, dim=1)               # (B, 12, H/2, W/2)
        return from_planes(mean + s / S.sqrt() * (gain * whitened + shift))         # (B, 3, H, W)

    def forward(self, x, q, x_hat, *given):
        """The training objective: the squared error of v over its variance in closed form, so that
        1 means that the network adds nothing. Planes count in proportion to s. given: the map."""
        log_snr, z, v = self.diffuse(x)
        error = to_planes(self.velocity(z, log_snr, q, x_hat, *given) - v)       # (B, 12, H/2, W/2)
        _, _, s, S = self.spread(log_snr, q)
        variance = s ** 2 / S                                                       # (B, 12, 1, 1)
        return {"loss": (s / s.mean(dim=1, keepdim=True) / variance * error.square()).mean()}


# Extension 2: HFD+, a little side information (this map and its code are ours) --------------------
ENERGY_LEVELS = 8   # of the map: the residual's energy over what is usual, 2^-4 to 2^3
MAP_TABLES = entropy.MapTables(ENERGY_LEVELS)


def residual_energy(x, x_hat, std, block):
    """The HFD+ map, how much detail x_hat lacks, block by block: the nearest of 0 .. 7 to
    4 + log2(mean square residual / std^2). x, x_hat: (B, 3, H, W); std: (B, 12), the usual rms
    residual at their level; block: pixels. Returns (B, 1, H / block, W / block), rounded up."""
    energy = (x - x_hat).square_().mean(dim=1, keepdim=True)                        # (B, 1, H, W)
    energy = F.avg_pool2d(energy, block, ceil_mode=True)                            # (B, 1, ., .)
    ratio = energy / std.square().mean(dim=1)[:, None, None, None]                  # (B, 1, ., .)
    return (4 + torch.log2(ratio + 1e-9)).round().clamp(0, ENERGY_LEVELS - 1)


class DiffusionPlus(Preconditioned):
    """The denoiser that ships: it takes the HFD+ map where there is one, and works without."""
    inputs = 26                      # two more: the map, and a plane that says whether there is one

    def velocity(self, z, log_snr, q, x_hat, energy=None):
        """As in Diffusion. energy: the map (B, 1, ., .) at a resolution that divides the picture's;
        where it is negative, that picture has none. None: no picture has one."""
        energy = z.new_full((len(z), 1, 1, 1), -1) if energy is None else energy    # (B, 1, ., .)
        there = (energy >= 0).to(z.dtype)                                           # (B, 1, ., .)
        hints = torch.cat([(energy - 4) / 4 * there, there], dim=1)                 # (B, 2, ., .)
        hints = F.interpolate(hints, (z.shape[2] // 2, z.shape[3] // 2))          # (B, 2, H/2, W/2)
        return super().velocity(z, log_snr, q, x_hat, hints)

    def forward(self, x, q, x_hat):
        """The training objective: half of the pictures come with a map, in blocks of 16 to 64. All
        maps are made, and one is chosen by its number, for a recorded step cannot branch."""
        sides, std = x.shape[2:], self.residual_std[q]                              # std: (B, 12)
        maps = [residual_energy(x, x_hat, std, math.gcd(CELL << n, *sides)) for n in range(3)]
        maps = [F.interpolate(energy, [side // CELL for side in sides]) for energy in maps]
        maps = torch.stack(maps + 3 * [torch.full_like(maps[0], -1)])           # (6, B, 1, ., .)
        picture = torch.arange(len(x), device=x.device)                             # (B,)
        return super().forward(x, q, x_hat, maps[torch.randint_like(picture, 6), picture])


# Extension 3: rectified flow, the paper's other decoder -------------------------------------------
def flow_log_snr_at(t, eta):
    """Its schedule: 2 log((1 - t) / t), shifted by eta as the cosine's. t, returns: as log_snr_at.

    Rectified flow (Liu et al. 2023; Lipman et al. 2023) goes from picture to noise in a straight
    line, (1 - t) x + t eps, and predicts eps - x. That is v-prediction with this schedule (Kingma &
    Gao 2023). A point on the line is z times a constant. An Euler step along it is a DDIM step. And
    eps - x = (sigma - alpha) z + (alpha + sigma) v, where z is known: the loss has another weight,
    (alpha + sigma)^2, which lies between 1 and 2, and which we leave out. With eta other than 1 the
    line is straight in t' = eta t / (1 - t + eta t): the same path, in other steps. But uniform t
    is not uniform t', so (alpha + sigma)^2 is no longer the flow's own weight."""
    return (-2 * torch.log(eta * t / (1 - t))).clamp(-15, 15)


# Extension 4: samplers for few steps --------------------------------------------------------------
def ddim_step(z, x, log_snr_t, log_snr_s, noise=None):
    """DDIM (Song, Meng & Ermon 2021): as ddpm_step, but with the noise that z_t implies, not new,
    z_s = alpha_s x + sigma_s eps with eps = (z_t - alpha_t x) / sigma_t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    ratio = sigma_s / sigma_t
    return z.mul_(float(ratio)).add_(x, alpha=float(alpha_s - ratio * alpha_t))


class DPMStep:
    """DPM-Solver++(2M) (Lu et al. 2022), one object a picture. DDIM takes the denoiser's x as
    constant during a step, though it moves. So continue the line through its last two values to the
    middle of this step, in log_snr: second order, at the price of remembering one picture."""
    x_before, log_snr_before = None, math.inf

    def __call__(self, z, x, log_snr_t, log_snr_s, noise=None):
        """As ddpm_step."""
        target = x
        if log_snr_t > self.log_snr_before:     # not at first, nor where log_snr is clamped
            ratio = (log_snr_s - log_snr_t) / (log_snr_t - self.log_snr_before)
            target = torch.lerp(x, self.x_before, float(-ratio / 2), out=self.x_before)
        self.x_before, self.log_snr_before = x, log_snr_t
        return ddim_step(z, target, log_snr_t, log_snr_s)


DENOISERS = {"plain": Diffusion, "preconditioned": Preconditioned, "plus": DiffusionPlus}
SCHEDULES = {"v": log_snr_at, "flow": flow_log_snr_at}
SAMPLERS = {"ddpm": lambda: ddpm_step, "ddim": lambda: ddim_step, "dpm": DPMStep}


# Pictures of any size, patch by patch -------------------------------------------------------------
@torch.no_grad()
def apply_tiled(f, inputs, out, tile=1024, context=160, group=None):
    """out[...] = f(*inputs), one tile at a time: what f needs does not grow with the picture.

    Our networks are convolutions, without attention or normalisation over space: an output pixel
    depends on inputs at most one *receptive field radius* away. So a tile evaluated with `context`
    >= radius pixels around it, cropped off again, is exactly the tile of the whole picture.

    inputs, out: (1, C, h, w), each at its own resolution, one at the picture's, whose sides are
    multiples of CELL; out is written to. tile, context: pixels, rounded up to cells, as strides
    need it; 160 do for the autoencoder. group: None, or (row % 2, column % 2) of those to visit."""
    tile, context = math.ceil(tile / CELL), math.ceil(context / CELL)               # in cells now
    rows, cols = (max(a.shape[d] for a in (*inputs, out)) // CELL for d in (2, 3))

    def cut(a, n, top, bottom, left, right):
        """A view of these cells of a, which have n samples a side."""
        return a[..., top * n:bottom * n, left * n:right * n]
    for top, left in product(range(0, rows, tile), range(0, cols, tile)):
        if group and (top // tile % 2, left // tile % 2) != group:
            continue
        above, before = min(context, top), min(context, left)       # what the window has around it
        window = top - above, top + tile + context, left - before, left + tile + context
        result = f(*(cut(a, a.shape[2] // rows, *window) for a in inputs))
        n = out.shape[2] // rows
        inner = cut(result, n, above, above + tile, before, before + tile)
        cut(out, n, top, top + tile, left, left + tile).copy_(inner)


# The defaults. STEPS, RELATIVE_ETA and WARP were chosen on photographs held out of training.
STEPS, PATCH, CONTEXT = 8, 512, 64
RELATIVE_ETA = 4.0                      # in units of the residual's standard deviation
WARP = 2.0                              # t^WARP for t, finer steps towards t = 0


def fast_bf16(device):
    """Whether bfloat16 is worth it: on recent GPUs, AMD's CPUs with AVX-512 and Intel's with AMX
    (there it was not timed against float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    amd = known.get("avx512_bf16") and "AMD" in known.get("cpu_name", "")
    return bool(known.get("amx_bf16") or amd)


def sample_picture(diffusion, x_hat, q, energy=None, steps=STEPS, sampler=None, seed=0, eta=None,
                   patch=PATCH, context=CONTEXT, on_step=lambda: None, group=None, known=None):
    """Sample a picture of any size, patch by patch, given x_hat (1, 3, H, W), sides multiples of
    16. Returns (1, 3, H, W) in [-1, 1].

    The patches move in step: each denoising step evaluates every one with `context` pixels around
    it and keeps its centre; then the whole canvas goes on to the next noise level. With the U-Net's
    receptive field radius as context this *is* sampling the whole picture; with none, seams show.

    q: an int; energy: None or the HFD+ map, one value per CELL, (1, 1, H/16, W/16); sampler: of
    SAMPLERS, None for "dpm", or for a flow Euler's step, "ddim"; seed: of the noise, drawn on the
    CPU; eta: None for RELATIVE_ETA times the residual's standard deviation; on_step(): called after
    each step; group, known: for sample_in_groups."""
    device, generator = x_hat.device, torch.Generator().manual_seed(seed)
    level = torch.tensor([q], device=device)                                        # (1,)
    given = [x_hat, energy] if energy is not None and diffusion.config.kind == "plus" else [x_hat]
    sampler = sampler or ("ddim" if diffusion.config.objective == "flow" else "dpm")
    eta = eta or RELATIVE_ETA * diffusion.residual_std[q].square().mean().sqrt().item()

    def noise():
        """A fresh standard normal tensor (1, 3, H, W)."""
        return torch.randn(x_hat.shape, generator=generator, dtype=x_hat.dtype).to(device)

    def predict_x(z, log_snr):
        """E[x | z_t, given] of the whole canvas (1, 3, H, W), or of a group and what is known."""
        canvas = (x_hat if known is None else known).clone()                        # (1, 3, H, W)
        now = log_snr.to(device, x_hat.dtype)[None]                                 # (1,)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
            apply_tiled(lambda z, *given: diffusion.predict_x(z, now, level, *given),
                        [z, *given], canvas, patch, context, group)
        on_step()
        return canvas
    # The network is told log_snr, not t. So eta may differ from training's, and steps may be finer
    # where detail is decided (Karras et al. 2022, section 3).
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** WARP                # (steps + 1,)
    log_snr = diffusion.schedule(t, eta)                                            # (steps + 1,)
    return sample_loop(predict_x, log_snr, SAMPLERS[sampler](), noise).clamp_(-1, 1)


def sample_in_groups(diffusion, x_hat, q, seed=0, **settings):
    """The paper's way, which needs no local network. As sample_picture, but four groups of patches
    that do not touch take turns, each going all the way from noise to picture. Elsewhere the
    denoiser's x is replaced by what earlier groups made, or by x_hat, so that z_t there has the
    right noise level. An approximation: early groups cannot know what late ones will do."""
    x = x_hat                                                                       # (1, 3, H, W)
    for n, group in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):        # (row, column) modulo 2
        x = sample_picture(diffusion, x_hat, q, seed=4 * seed + n, group=group, known=x, **settings)
    return x


# A model is a folder of arrays: autoencoder.npz and, after stage 2, denoiser.npz ------------------
class HFDError(Exception):
    """Something the user can put right. One line: what is wrong, with which file, what to do."""


def write_atomically(path, write):
    """Call write(f) on a temporary file, then rename it: `path` is always complete, old or new. A
    link is followed, and a file that was there keeps its mode. HFDError if the system refuses."""
    path = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), f".hfd-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            os.chmod(temporary, os.stat(path).st_mode)
        os.replace(temporary, path)
    except OSError as error:
        if not error.errno:                                 # not the system's but Pillow's
            raise
        advice = "nothing was changed; make room, or name another place"
        raise HFDError(f"{path}: {error.strerror}; {advice}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_archive(path, about, arrays):
    """Write {name: tensor or NumPy array} and `about`, a dictionary that JSON can hold."""
    arrays = {name: a.cpu().numpy() if torch.is_tensor(a) else a for name, a in arrays.items()}
    arrays["json"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    write_atomically(path, lambda f: np.savez(f, **arrays))


def read_archive(path):
    """(about, {name: NumPy array}). Nothing in the file can run. HFDError if it is damaged."""
    try:
        with warnings.catch_warnings(action="ignore"), np.load(path, allow_pickle=False) as archive:
            if sum(member.file_size for member in archive.zip.infolist()) > os.path.getsize(path):
                raise ValueError                            # it unpacks to more than its size
            arrays = dict(archive)
        return dict(json.loads(arrays.pop("json").tobytes())), arrays
    except FileNotFoundError:
        raise HFDError(f"{path}: no such file; name another folder, or train a model") from None
    except Exception as error:          # the many ways in which a damaged file can fail to unpack
        raise HFDError(f"{path}: not part of an HFD model ({type(error).__name__})") from None


def save_part(path, network, recipe, **more):
    """Write what ships of a stage: layers' weights in half precision, a prior frozen to integer
    tables. recipe: how it was made; more: what else to tell."""
    arrays = {f"weights.{name}": a.half() if name.endswith("weight") else a
              for name, a in network.state_dict().items()}
    if isinstance(network, Autoencoder):
        tables = vars(network.prior.freeze(network.log_step.exp()))
        arrays |= {f"tables.{name}": a for name, a in tables.items()}
    about = {"format": "hfd 1", "config": asdict(network.config), "recipe": recipe, **more}
    write_archive(path, about, arrays)


def load_part(path, config_kind, device):
    """(network, about, tables by name) of an archive. ValueError and the like if it is not one."""
    about, arrays = read_archive(path)
    if about["format"] != "hfd 1":
        raise ValueError("it was written by another version")
    # A forged configuration may ask for anything. So its numbers must be sane; then a network is
    # built on torch's device "meta", which takes no memory, and given the weights if they fit.
    config = config_kind(**about["config"])
    numbers = np.hstack([getattr(config, f.name) for f in fields(config) if f.type is not str])
    if not ((0 <= numbers) & (numbers <= 1024)).all() or len(numbers) + sum(config.blocks) > 64:
        raise ValueError("its configuration cannot be meant")
    with torch.device("meta"):
        kind = Autoencoder if config_kind is AutoencoderConfig else DENOISERS[config.kind]
        network = kind(config)
    weights, tables = ({name.removeprefix(part): a for name, a in arrays.items()
                        if name.startswith(part)} for part in ("weights.", "tables."))
    weights = {name: torch.from_numpy(a).float() for name, a in weights.items()}
    if not all(a.isfinite().all() for a in weights.values()):
        raise ValueError("its weights are not all numbers")
    network.load_state_dict(weights, assign=True)
    network.float().requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return network, about, tables


@dataclass
class Model:
    """A loaded model."""
    device: torch.device
    autoencoder: Autoencoder
    tables: entropy.Tables
    identity: bytes                     # 4, of weights and tables: what a file's latent depends on
    recipes: dict                       # how each part was made
    diffusion: Diffusion = None         # there is none after stage 1


def load_model(folder, device="cpu"):
    """The Model in a folder; it carries its configuration. HFDError if it cannot be used."""
    path = os.path.join(folder, "autoencoder.npz")
    try:
        autoencoder, about, tables = load_part(path, AutoencoderConfig, device)
        tables = entropy.TABLES[autoencoder.config.prior](**tables).validate()
        if tables.octaves.shape != autoencoder.log_step.shape:
            raise ValueError("its tables do not belong to its weights")
        weights = [a.cpu().numpy() for a in autoencoder.state_dict().values()]
        data = b"".join(a.tobytes() for a in (*weights, *vars(tables).values()))
        model = Model(torch.device(device), autoencoder, tables, hashlib.sha256(data).digest()[:4],
                      {"autoencoder": about["recipe"]})
        # A forged configuration may not fit together: so make 16x16 pixels, at the last level.
        last = len(autoencoder.lambdas) - 1
        x = autoencoder.log_step.new_zeros(1, 3, CELL, CELL)                        # (1, 3, 16, 16)
        x_hat = autoencoder.decode(autoencoder.encode(x, last), last)               # (1, 3, 16, 16)
        path = os.path.join(folder, "denoiser.npz")
        if os.path.exists(path):
            model.diffusion, about, _ = load_part(path, DiffusionConfig, device)
            if about["autoencoder"] != model.identity.hex():
                raise ValueError("it was trained for another autoencoder than the one beside it")
            sample_picture(model.diffusion, x_hat, last, steps=1)
            model.recipes["denoiser"] = about["recipe"]
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise HFDError(f"{path}: cannot be used ({' '.join(str(error).split())[:120]})") from None
    return model
