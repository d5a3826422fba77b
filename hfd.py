"""Pictures: an autoencoder spends the bits, and a diffusion model draws what they left out.

A small, complete implementation of "High-Fidelity Image Compression with Score-based Generative
Models" (Hoogeboom, Agustsson, Mentzer, Versari, Toderici, Theis 2023, arXiv 2305.18231), called
HFD: High-Fidelity Diffusion. Two stages:

    x --encoder--> y --round--> k --coder--> file --> k --decoder--> x_hat --diffusion--> x_sample

1. An autoencoder, trained for rate + lambda * MSE and nothing else. Its picture x_hat is right but
   blurry: the best guess under squared error is an average over all that the bits leave open.
2. A conditional diffusion model, trained to sample x given x_hat. It costs no bits at all.

The file goes in that order: autoencoder, noise, U-Net, the plain diffusion model and how to sample
from it. Then come extensions, each under its name: a closed-form start, HFD+, rectified flow, other
samplers; then pictures of any size; last, how a model is written and read.

Symbols are the paper's: x image, y latent, x_hat reconstruction, t in [0, 1] time, z_t noisy image,
eps noise, v velocity, alpha_t and sigma_t the scales of signal and noise, log_snr =
log(alpha_t^2 / sigma_t^2). Pictures are float tensors (B, 3, H, W), RGB, in [-1, 1].
"""
import functools
import hashlib
import json
import math
import os
import shutil
import warnings
import zipfile
from dataclasses import asdict, dataclass

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


# An orthonormal rotation of (R, G, B): grey, red - blue, magenta - green. Nearly all is in the
# first.
COLOUR = F.normalize(torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64))


def transform_basis(count):
    """The `count` most important functions of an orthonormal transform, (count, 3, 32, 32).

    Start from what is known. JPEG rotates the colours, so that most energy is in one, and expands
    blocks of pixels in cosines, which puts nearly all energy into few coefficients (DCT; Ahmed,
    Natarajan & Rao 1974). Blocks show at low rates; so here functions twice as wide overlap by
    half: the lapped orthogonal transform (Malvar & Staelin 1989). Even and odd cosines, subtracted,
    nearly vanish at one end; with their mirror image in the next block they fade in and out. One
    more rotation packs the energy, that of pixels whose neighbours have a correlation of 0.95."""
    n = torch.arange(CELL, dtype=torch.float64)
    dct = torch.cos(math.pi / CELL * (n + 0.5) * n[:, None]) * math.sqrt(2 / CELL)  # (16, 16)
    dct[0] /= math.sqrt(2)
    fade = (dct[0::2] - dct[1::2]) / 2                                              # (8, 16)
    lapped = torch.cat([torch.cat([fade, fade.flip(1)], 1),
                        torch.cat([fade, -fade.flip(1)], 1)])                       # (16, 32)
    wide = torch.arange(2 * CELL, dtype=torch.float64)
    covariance = 0.95 ** (wide - wide[:, None]).abs()       # (32, 32), of a Markov chain
    energy, rotation = torch.linalg.eigh(lapped @ covariance @ lapped.T)           # (16,), (16, 16)
    lapped = rotation.T @ lapped
    # In two dimensions functions are products, and so are energies. Colour has a twentieth.
    importance = torch.tensor([1, 0.05, 0.05])[:, None, None] * energy[:, None] * energy
    chosen = importance.flatten().argsort(descending=True)[:count]                  # of (3, 16, 16)
    c, u, v = chosen // CELL ** 2, chosen // CELL % CELL, chosen % CELL             # (count,) each
    return torch.einsum("mc,mi,mj->mcij", COLOUR[c], lapped[u], lapped[v]).float()


class ResidualBlock(nn.Module):
    """x + conv(relu(gain * conv(relu(x)))), with a gain per channel and quality level: all that
    tells the transforms how coarsely this picture is quantized."""

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
    """A linear path plus a deep one. The linear path is one convolution, and starts as a transform
    codec that works. The deep path has four stride-2 stages, with residual blocks where resolution
    is low, as in ELIC (He et al. 2022); its last layer starts at zero, so it only ever improves on
    the linear one. Strides come from `PixelUnshuffle`, which makes each 2x2 square one pixel of
    four times the channels, so that no convolution runs at full resolution."""

    def forward(self, x, q):
        """x: (B, C, ., .), as both paths take it; q: (B,) levels. Returns float32."""
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
        # The lapped transform is a 32x32 convolution at stride 16. Laying each 16x16 block into
        # channels first makes it a 2x2 convolution: the same numbers by a plain matrix product.
        conv = nn.Conv2d(3 * CELL ** 2, config.latents, 2)
        conv.weight.data.copy_(F.pixel_unshuffle(basis, CELL))
        nn.init.zeros_(conv.bias)
        self.linear = nn.Sequential(nn.ZeroPad2d(CELL // 2), nn.PixelUnshuffle(CELL), conv)
        layers, width, levels = [], 3, len(config.lambdas)
        for w, n in zip(config.widths, config.blocks):
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * width, w, 3, padding=1)]
            layers += [ResidualBlock(w, levels) for _ in range(n)]
            width = w
        layers += [nn.ReLU(), zeroed(nn.Conv2d(width, config.latents, 1))]
        self.deep = nn.ModuleList(layers)


class Synthesis(Transform):
    """Dequantized latent y_hat (B, M, h, w) to x_hat (B, 3, 16 h, 16 w), not clamped. The linear
    path has the same basis, for an orthonormal matrix is inverted by its transpose."""

    def __init__(self, config, basis):
        super().__init__()
        conv = nn.Conv2d(config.latents, 3 * CELL ** 2, 2, padding=1)
        # Transposing a convolution exchanges its channels and turns its kernel around.
        conv.weight.data.copy_(F.pixel_unshuffle(basis, CELL).transpose(0, 1).flip(2, 3))
        nn.init.zeros_(conv.bias)
        self.linear = nn.Sequential(conv, nn.PixelShuffle(CELL), nn.ZeroPad2d(-CELL // 2))
        width, levels = config.widths[-1], len(config.lambdas)
        layers = [nn.Conv2d(config.latents, width, 3, padding=1)]
        for w, n in zip(config.widths[-2::-1] + (3,), config.blocks[::-1]):
            layers += [ResidualBlock(width, levels) for _ in range(n)]
            layers += [nn.Conv2d(width, 4 * w, 3, padding=1), nn.PixelShuffle(2)]
            width = w
        zeroed(layers[-2])
        self.deep = nn.ModuleList(layers)


class Autoencoder(nn.Module):
    """Transforms, quantization steps and prior: everything about the bits.

    The paper trains one autoencoder per rate. This one serves the whole rate-distortion curve: at
    quality level q = 0 .. Q-1, channel m is quantized with a step of its own, step[q, m]."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        with torch.device("cpu"):                           # whatever device the rest is built on
            basis = transform_basis(config.latents)
        Q, M = len(config.lambdas), config.latents
        self.analysis, self.synthesis = Analysis(config, basis), Synthesis(config, basis)
        self.prior = entropy.PRIORS[config.prior](M, Q)
        # Which steps to start from: at high rate, a coefficient quantized with step d costs
        # h - log2 d bits (h is its differential entropy) and has the squared error d^2 / 12. The
        # derivative of rate + price * error is zero at d^2 = 6 / (price ln 2). Here the price is
        # lambda for one coefficient: x is in units of 127.5, and MSE averages three channels.
        lambdas = torch.tensor(config.lambdas, dtype=torch.float32)                 # (Q,)
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
        """The training objective, rate + lambda * MSE (Balle et al. 2017).

        x: (B, 3, H, W) in [-1, 1], H and W multiples of 16; q: (B,) levels. Returns (B,) tensors:
        `loss`, `bpp` (estimated bits per pixel) and `mse` (per channel, on the scale 0..255)."""
        step, lambdas = self.step(q), self.lambdas[q]
        # Latent. Rounding has no gradient. For the rate, uniform noise as wide as a step stands in
        # for it (Balle et al. 2017): the noisy latent's density is, at every integer, exactly that
        # bin's probability. But the decoder must see what it will see in earnest, rounded values;
        # there the gradient passes straight through. So the step is pushed by both: the rate wants
        # it wide, the error wants it narrow.
        u = self.analysis(x, q) / step                                              # (B, M, h, w)
        noisy = u + torch.rand_like(u) - 0.5                                        # (B, M, h, w)
        rounded = u + (u.round() - u).detach()                                      # (B, M, h, w)
        # Rate, in bits per pixel.
        bits = self.prior.bits(noisy, rounded, step, q).sum(dim=(1, 2, 3))          # (B,)
        bpp = bits / (x.shape[2] * x.shape[3])
        # Distortion.
        x_hat = self.synthesis(self.dequantize(rounded, q), q)                      # (B, 3, H, W)
        mse = (x_hat - x).square().mean(dim=(1, 2, 3)) * 127.5 ** 2                 # (B,)
        # The sum is some ten times larger at the last level than at the first. Dividing by
        # sqrt(lambda) lets one per cent of it weigh about the same at each.
        weight = (self.lambdas.mean() / lambdas).sqrt()
        return {"loss": weight * (bpp + lambdas * mse), "bpp": bpp, "mse": mse}

    @torch.no_grad()
    def encode(self, x, q):
        """Picture (1, 3, H, W) in [-1, 1], sides multiples of 16, to its integer latent k
        (1, M, H/16, W/16), int32. HFDError if a badly trained encoder makes no such numbers."""
        level = torch.tensor([q], device=x.device)
        u = x.new_empty(1, self.config.latents, x.shape[2] // CELL, x.shape[3] // CELL)
        apply_tiled(lambda window: self.analysis(window, level) / self.step(level), [x], u)
        if not u.abs().max() < 2 ** 29:                     # also if it is not a number
            raise HFDError("the autoencoder turns this picture into numbers that no file can hold; "
                           "its training has failed: train it again with a lower --lr")
        return u.round().int()

    @torch.no_grad()
    def decode(self, k, q):
        """Integer latent k (1, M, h, w) to x_hat (1, 3, 16 h, 16 w) in [-1, 1]."""
        level = torch.tensor([q], device=k.device)
        x_hat = torch.empty(1, 3, CELL * k.shape[2], CELL * k.shape[3], device=k.device)
        apply_tiled(lambda k: self.synthesis(self.dequantize(k, level), level), [k], x_hat)
        return x_hat.clamp_(-1, 1)


# Stage 2: noise, and a network that removes it ----------------------------------------------------
# Diffusion (Sohl-Dickstein et al. 2015; Ho et al. 2020) destroys a picture gradually and learns to
# go back: z_t = alpha_t x + sigma_t eps with eps ~ N(0, I) and alpha_t^2 + sigma_t^2 = 1 ("variance
# preserving"). All that matters about time is the ratio of signal to noise, log_snr =
# log(alpha^2 / sigma^2), which falls from very clean (t = 0) to pure noise (t = 1). Which t sees
# which ratio is the *schedule*.


def alpha_sigma(log_snr):
    """(alpha, sigma): alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr)."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def log_snr_at(t, eta):
    """The shifted cosine schedule: log_snr(t; eta) = -2 log(eta tan(pi t / 2)), within +-15.

    eta = 1 is the cosine schedule (Nichol & Dhariwal 2021, without their offset; as a log SNR in
    *simple diffusion*, Hoogeboom et al. 2023). The paper takes eta = 0.5, *less* noise: x_hat holds
    the global structure, and what is left to decide is fine detail, which little noise is enough to
    hide. (Text to image shifts the other way.) t: tensor in [0, 1]. Returns its shape."""
    # tan = sin / cos, and cos(pi t / 2) = sin(pi (1 - t) / 2): both positive up to the ends.
    noise, signal = torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * (1 - t))
    return (-2 * torch.log(eta * noise / signal)).clamp(-15, 15)


class ChannelNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the channels of each pixel.

    Group norm, the usual choice, averages over all pixels, so that every output pixel would depend
    on the whole picture and no patch could be computed by itself."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        """x: (B, C, h, w). Returns its shape, each pixel with mean 0 and variance 1."""
        if self.kind == "rms":          # of a denoiser from before: its mean stays (RMSNorm)
            return x * (x.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


class UNetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. The conditioning sets a scale and a shift per channel in
    between (FiLM, Perez et al. 2018). The second convolution's weights start at zero, so that the
    block starts as the identity but for a constant."""

    def __init__(self, width, conditioning, norm):
        super().__init__()
        self.norm = ChannelNorm(norm)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(conditioning, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, c):
        """x: (B, C, h, w); c: (B, conditioning). Returns the shape of x."""
        scale, shift = self.film(c)[:, :, None, None].chunk(2, dim=1)            # (B, C, 1, 1) each
        h = self.conv1(F.silu(self.norm(x)))                                        # (B, C, h, w)
        h = torch.addcmul(shift, self.norm(h), 1 + scale)                           # (B, C, h, w)
        return x + self.conv2(F.silu(h))


class UNet(nn.Module):
    """A compact U-Net (Ronneberger et al. 2015), with additive shortcuts. No attention, and nothing
    else that mixes distant pixels: see `apply_tiled` for what that buys."""

    def __init__(self, inputs, outputs, widths, blocks, levels, norm, conditioning=128):
        super().__init__()
        self.level = nn.Embedding(levels, conditioning)
        self.embed = nn.Sequential(nn.Linear(64, conditioning), nn.SiLU(),
                                   nn.Linear(conditioning, conditioning))
        frequencies = torch.logspace(-1.5, 0.5, 32, device="cpu")                   # slow to fast
        self.register_buffer("frequencies", frequencies, persistent=False)

        def stack(width, count):
            """`count` blocks in a row."""
            return nn.ModuleList(UNetBlock(width, conditioning, norm) for _ in range(count))

        self.stem = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList(map(stack, widths, blocks))
        self.up = nn.ModuleList(map(stack, widths, blocks))
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for a, b in zip(widths, widths[1:]):
            self.shrink.append(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1)))
            self.grow.append(nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)))
        head = zeroed(nn.Conv2d(widths[0], outputs, 3, padding=1))
        self.head = nn.Sequential(ChannelNorm(norm), head)

    def forward(self, x, log_snr, q):
        """x: (B, inputs, h, w); log_snr, q: (B,). Returns (B, outputs, h, w), float32."""
        # Slow and fast waves let a small network tell nearby noise levels apart (Vaswani et al.
        # 2017).
        angles = log_snr[:, None] * self.frequencies                                # (B, 32)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)                      # (B, 64)
        c = F.silu(self.embed(waves) + self.level(q))                            # (B, conditioning)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))              # (B, C0, h, w)
        shortcuts = []
        for i, stack in enumerate(self.down):
            for block in stack:
                h = block(h, c)                                                  # (B, Ci, h/2^i, .)
            if i < len(self.shrink):
                shortcuts.append(h)
                h = self.shrink[i](h)                                             # (B, C(i+1), ...)
        for i in reversed(range(len(self.up))):
            if i < len(self.grow):
                h = self.grow[i](h) + shortcuts.pop()                            # (B, Ci, h/2^i, .)
            for block in self.up[i]:
                h = block(h, c)
        return self.head(h).float()                                             # (B, outputs, h, w)


@dataclass
class DiffusionConfig:
    """What rebuilds a Diffusion. `levels`: the autoencoder's quality levels; `widths`, `blocks`: of
    the U-Net at 1/2, 1/4, ... of the resolution; `eta`: shift of the training schedule; `kind`: one
    of DENOISERS; `objective`: one of SCHEDULES."""
    levels: int = 6
    widths: tuple = (48, 96, 192)
    blocks: tuple = (2, 2, 2)
    eta: float = 0.1
    kind: str = "plus"
    objective: str = "v"
    norm: str = "layer"


class Diffusion(nn.Module):
    """The conditional denoiser, plain v-prediction: what it predicts, how it is trained.

    It predicts the velocity v = alpha eps - sigma x (Salimans & Ho 2022), from which both follow:
    x = alpha z - sigma v and eps = sigma z + alpha v. A network that predicts eps has its error in
    x multiplied by sigma / alpha, one that predicts x the reverse: each explodes at one end of
    time. With v neither does."""
    inputs, outputs = 24, 12          # planes of the U-Net: 2x2 pixels of three colours make twelve

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or DiffusionConfig(kind="plain")
        self.net = UNet(self.inputs, self.outputs, config.widths, config.blocks, config.levels,
                        config.norm)
        # The rms of x - x_hat in each plane at each level, (Q, 12): measured when training starts.
        self.register_buffer("residual_std", torch.full((config.levels, 12), 0.1))

    def schedule(self, t, eta=None):
        """log_snr at times t, a tensor in [0, 1]. eta: None for that of training."""
        return SCHEDULES[self.config.objective](t, eta or self.config.eta)

    def velocity(self, z, log_snr, q, x_hat):
        """The network's v for z_t = z, both (B, 3, H, W); log_snr, q: (B,)."""
        # 2x2 squares of pixels become channels, so that no convolution runs at full resolution.
        planes = F.pixel_unshuffle(torch.cat([z, x_hat], dim=1), 2)              # (B, 24, H/2, W/2)
        return F.pixel_shuffle(self.net(planes, log_snr, q), 2)                     # (B, 3, H, W)

    def predict_x(self, z, log_snr, q, *given):
        """E[x | z_t, given] = alpha z - sigma v, (B, 3, H, W). given: x_hat, and what else a kind
        of denoiser takes."""
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])
        return alpha * z - sigma * self.velocity(z, log_snr, q, *given)

    def diffuse(self, x):
        """Draw times and noise for a batch x (B, 3, H, W): (log_snr (B,), z_t, v)."""
        # One uniform number, spread evenly over the batch: every step sees all times (Kingma et al.
        # 2021).
        B = len(x)
        t = (torch.rand((), device=x.device) + torch.arange(B, device=x.device) / B) % 1    # (B,)
        log_snr = self.schedule(t)                                                  # (B,)
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])                    # (B, 1, 1, 1)
        eps = torch.randn_like(x)                                                   # (B, 3, H, W)
        return log_snr, alpha * x + sigma * eps, alpha * eps - sigma * x

    def forward(self, x, x_hat, q):
        """The training objective: mean squared error on v, t uniform. A scalar.
        x, x_hat: (B, 3, H, W) in [-1, 1]; q: (B,) levels."""
        log_snr, z, v = self.diffuse(x)
        return (self.velocity(z, log_snr, q, x_hat) - v).square().mean()


# Sampling: from noise back to a picture -----------------------------------------------------------


def ddpm_step(z, x, log_snr_t, log_snr_s, noise):
    """Ancestral sampling, from t to a smaller s (Ho et al. 2020, as in Kingma et al. 2021): draw
    from q(z_s | z_t, x) = N(alpha_s ((1 - c) z_t / alpha_t + c x), sigma_s^2 c),  c = 1 - SNR_t /
    SNR_s. z: z_t, overwritten, for it may be large; x: the denoiser's; noise(): a standard
    normal."""
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    c = -torch.expm1(log_snr_t - log_snr_s)     # expm1: for small steps 1 - ratio would cancel
    z.mul_(float(alpha_s * (1 - c) / alpha_t)).add_(x, alpha=float(alpha_s * c))    # the mean
    return z.add_(noise(), alpha=float(sigma_s * c.sqrt()))                         # + std * noise


@torch.no_grad()
def sample(predict_x, steps, step, schedule, noise, on_step=lambda step: None):
    """Draw x: start from noise at t = 1 and walk to t = 0 in equal steps of t.

    predict_x(z, log_snr): the denoiser, log_snr a float64 scalar tensor. step: ddpm_step or another
    one. schedule: t to log_snr, tensors. noise(): a fresh standard normal tensor. Returns its
    shape, the last x of the denoiser. on_step is told how many steps are done."""
    log_snr = schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))        # (steps + 1,)
    z = noise()
    for i in range(steps):
        x = predict_x(z, log_snr[i])
        on_step(i + 1)
        if i + 1 < steps:
            z = step(z, x, log_snr[i], log_snr[i + 1], noise)
    return x


# Extension 1: a closed-form start -----------------------------------------------------------------

HAAR = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / math.sqrt(2)
PLANES = torch.kron(COLOUR, torch.kron(HAAR, HAAR))         # (12, 12), orthonormal


@functools.lru_cache(8)
def planes_on(device, dtype):
    """PLANES, uploaded once."""
    return PLANES.to(device, dtype)


def to_planes(x):
    """Pictures (B, 3, H, W) to 12 planes each, (B, 12, H/2, W/2): every 2x2 square of pixels in an
    orthonormal basis, three colour axes (grey, red - blue, magenta - green) times four Haar
    functions (mean, horizontal, vertical, diagonal).

    What autoencoders lose differs much more between these planes than between pixels. And white
    noise stays white noise under a rotation, so diffusion does not notice."""
    with torch.autocast(x.device.type, enabled=False):
        planes = planes_on(x.device, x.dtype)
        return torch.einsum("pc,bchw->bphw", planes, F.pixel_unshuffle(x, 2))    # (B, 12, H/2, W/2)


def from_planes(p):
    """The inverse of `to_planes`: (B, 12, H/2, W/2) to (B, 3, H, W)."""
    with torch.autocast(p.device.type, enabled=False):
        planes = planes_on(p.device, p.dtype)
        return F.pixel_shuffle(torch.einsum("pc,bphw->bchw", planes, p), 2)         # (B, 3, H, W)


class Preconditioned(Diffusion):
    """v-prediction that starts from what is known in closed form (Karras et al. 2022, section 5,
    here around x_hat).

    Suppose x ~ N(x_hat, s^2), independently for each pixel, with an s of its own for each plane and
    level: that is all that the autoencoder's errors say. Then d = z - alpha x_hat has the variance
    S = alpha^2 s^2 + sigma^2, and by the rules for Gaussians

        E[v | z] = alpha sigma (1 - s^2) d / S - sigma x_hat,     std[v | z] = s / sqrt(S).

    The network adds to the first, in units of the second. As the autoencoder starts from a lapped
    transform, so the denoiser starts from here: with the network still at zero it already is the
    best denoiser that knows s and nothing about pictures."""
    outputs = 24

    def closed_form(self, z, log_snr, q, x_hat):
        """(mean, std, whitened residual) of the docstring above, each (B, 12, H/2, W/2) or, of std,
        (B, 12, 1, 1). z, x_hat: planes (B, 12, H/2, W/2)."""
        log_snr, s = log_snr[:, None, None, None], self.residual_std[q][:, :, None, None]
        alpha, sigma = alpha_sigma(log_snr)                                      # (B, 1, 1, 1) each
        d, S = z - alpha * x_hat, alpha ** 2 * s ** 2 + sigma ** 2
        return alpha * sigma * (1 - s ** 2) * d / S - sigma * x_hat, s / S.sqrt(), d / S.sqrt()

    def velocity(self, z, log_snr, q, x_hat, *hints):
        """As in Diffusion. hints: more planes (B, ., H/2, W/2) for the network to see."""
        z, x_hat = to_planes(z), to_planes(x_hat)                                # (B, 12, H/2, W/2)
        mean, std, whitened = self.closed_form(z, log_snr, q, x_hat)
        # In truth s is not the same everywhere: large in grass, next to nothing in the sky. Were it
        # known for each pixel, E[v | z] would still be linear in d, only with another slope. So the
        # network gives two numbers for each: a gain that corrects the slope, which in the sky takes
        # all noise out again, and a shift for what a slope cannot say.
        given = torch.cat([whitened, x_hat, *hints], dim=1)
        gain, shift = self.net(given, log_snr, q).chunk(2, dim=1)                # (B, 12, H/2, W/2)
        return from_planes(mean + std * (gain * whitened + shift))                  # (B, 3, H, W)

    def forward(self, x, x_hat, q, *given):
        """The training objective. The error of v is divided by the std that the closed form leaves:
        a loss of 1 means that the network adds nothing. And planes count in proportion to their s:
        where little is missing, errors are seen little."""
        log_snr, z, v = self.diffuse(x)
        error = to_planes(self.velocity(z, log_snr, q, x_hat, *given) - v)       # (B, 12, H/2, W/2)
        s = self.residual_std[q][:, :, None, None]                                  # (B, 12, 1, 1)
        alpha, sigma = alpha_sigma(log_snr[:, None, None, None])                 # (B, 1, 1, 1) each
        variance = s ** 2 / (alpha ** 2 * s ** 2 + sigma ** 2)                      # (B, 12, 1, 1)
        return (s / s.mean(dim=1, keepdim=True) / variance * error.square()).mean()


# Extension 2: HFD+, a little side information (this map and its code are ours) --------------------

ENERGY_LEVELS = 8   # of the map: powers of two of the residual's expected energy, from 2^-4 to 2^3


def residual_energy(x, x_hat, std, block):
    """The HFD+ map: how much detail the reconstruction lacks, block by block, in 8 levels.

    x, x_hat: (B, 3, H, W); std: (B, 12), the rms residual that the level usually has; block:
    pixels, a power of two. Returns (B, 1, ceil(H / block), ceil(W / block)) integers 0..7: 4 +
    log2(mean square residual / std^2), rounded."""
    energy = (x - x_hat).square_().mean(dim=1, keepdim=True)                        # (B, 1, H, W)
    energy = F.avg_pool2d(energy, block, ceil_mode=True)                            # (B, 1, ., .)
    ratio = energy / std.square().mean(dim=1)[:, None, None, None]
    return (4 + torch.log2(ratio + 1e-9)).round().clamp(0, ENERGY_LEVELS - 1)


class DiffusionPlus(Preconditioned):
    """The denoiser that ships: it takes the HFD+ map where there is one, and works without."""
    inputs = 26                      # two more: the map, and a plane that says whether there is one

    def velocity(self, z, log_snr, q, x_hat, energy=None):
        """As in Diffusion. energy: the map (B, 1, ., .) at a resolution that divides the picture's;
        where it is negative, that picture has none. None: no picture has one."""
        if energy is None:
            energy = z.new_full((len(z), 1, 1, 1), -1)
        there = (energy >= 0).to(z.dtype)                                           # (B, 1, ., .)
        hints = torch.cat([(energy - 4) / 4 * there, there], dim=1)                 # (B, 2, ., .)
        hints = F.interpolate(hints, (z.shape[2] // 2, z.shape[3] // 2))          # (B, 2, H/2, W/2)
        return super().velocity(z, log_snr, q, x_hat, hints)

    def forward(self, x, x_hat, q):
        """The training objective: half of the pictures come with a map, in blocks of 16 to 64."""
        block = math.gcd(16 << int(torch.randint(3, ())), *x.shape[2:])
        energy = residual_energy(x, x_hat, self.residual_std[q], block)             # (B, 1, ., .)
        with_map = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return super().forward(x, x_hat, q, energy.where(with_map, -1.0))


DENOISERS = {"plain": Diffusion, "preconditioned": Preconditioned, "plus": DiffusionPlus}

# Extension 3: rectified flow, the paper's other decoder -------------------------------------------


def flow_log_snr_at(t, eta):
    """Its schedule: 2 log((1 - t) / t), shifted by eta as the cosine's. t, returns: as log_snr_at.

    Rectified flow (Liu et al. 2023; Lipman et al. 2023) goes from picture to noise in a straight
    line, z'_t = (1 - t) x + t eps, and its network predicts eps - x. That is v-prediction with this
    schedule, by three facts (Kingma & Gao 2023; the tests show them). A point on the line is z
    times a constant. eps - x = (sigma - alpha) z + (alpha + sigma) v, where z is known: a weight
    (alpha + sigma)^2 between 1 and 2, which we leave out. An Euler step along the line is a DDIM
    step. With eta other than 1 it is straight in t' = eta t / (1 - t + eta t): the same path, in
    other steps."""
    return (-2 * torch.log(eta * t / (1 - t))).clamp(-15, 15)


SCHEDULES = {"v": log_snr_at, "flow": flow_log_snr_at}

# Extension 4: samplers for few steps --------------------------------------------------------------


def ddim_step(z, x, log_snr_t, log_snr_s, noise=None):
    """DDIM (Song, Meng & Ermon 2021), as ddpm_step: keep the noise that z_t implies, eps =
    (z_t - alpha_t x) / sigma_t, and put less of it back, z_s = alpha_s x + sigma_s eps. Nothing is
    random after the start."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    ratio = sigma_s / sigma_t
    return z.mul_(float(ratio)).add_(x, alpha=float(alpha_s - ratio * alpha_t))


class DPMStep:
    """DPM-Solver++(2M) (Lu et al. 2022), one object for each picture.

    DDIM treats the denoiser's x as constant during a step, though it moves as the noise falls. So
    continue the line through its last two values to the middle of this step, on the log_snr axis:
    second order, at the price of remembering one picture."""

    def __init__(self):
        self.x_before = self.log_snr_before = None

    def __call__(self, z, x, log_snr_t, log_snr_s, noise=None):
        """As ddpm_step."""
        target = x
        # (Where the schedule is clamped, nothing has moved.) What was remembered has served after
        # this, and the target takes its place in memory.
        if self.x_before is not None and log_snr_t > self.log_snr_before:
            ratio = (log_snr_s - log_snr_t) / (log_snr_t - self.log_snr_before)
            target = torch.lerp(x, self.x_before, float(-ratio / 2), out=self.x_before)
        z = ddim_step(z, target, log_snr_t, log_snr_s)
        # A copy, for predict_x may write into its canvas again.
        self.x_before = x.clone() if self.x_before is None else self.x_before.copy_(x)
        self.log_snr_before = log_snr_t
        return z


SAMPLERS = {"ddpm": lambda: ddpm_step, "ddim": lambda: ddim_step, "dpm": DPMStep}

# Pictures of any size, patch by patch -------------------------------------------------------------


def apply_tiled(f, inputs, out, tile=1024, context=160, chosen=None):
    """out[...] = f(*inputs), one tile at a time, so that memory does not grow with the picture.

    Our networks are convolutions without attention and without normalisation over space. Such a
    network is a local rule: an output pixel depends on inputs at most one *receptive field radius*
    away. So a tile evaluated together with `context` >= radius pixels around it is, once these are
    cropped off again, exactly the tile of the whole picture. (At the picture's own edges the
    windows end, and the convolutions pad with zeros as they would for the whole.)

    inputs, out: tensors (1, C, h, w) of one picture, whose sides are multiples of CELL, each at its
    own resolution, one at the picture's; out is written to. tile, context: pixels, rounded up to
    cells, which keeps windows aligned with the strides; 160 is enough for the autoencoder.
    chosen(row, column): whether to visit a tile. ValueError for more than one picture."""
    if any(len(t) != 1 for t in (*inputs, out)):
        raise ValueError("one picture at a time, please: tensors of shape (1, C, H, W)")
    tile, context = math.ceil(tile / CELL), math.ceil(context / CELL)               # in cells now
    rows, cols = (max(t.shape[d] for t in (*inputs, out)) // CELL for d in (2, 3))

    def cut(t, top, bottom, left, right):
        """The part of t between these cells, a view."""
        n = t.shape[2] // rows                  # samples per cell and side: of x_hat 16, of k 1
        return t[..., top * n:bottom * n, left * n:right * n]

    for top in range(0, rows, tile):
        for left in range(0, cols, tile):
            if chosen and not chosen(top // tile, left // tile):
                continue
            bottom, right = min(top + tile, rows), min(left + tile, cols)
            y, x = max(top - context, 0), max(left - context, 0)
            window = y, min(bottom + context, rows), x, min(right + context, cols)
            n = out.shape[2] // rows
            result = f(*(cut(t, *window) for t in inputs))
            inner = result[..., (top - y) * n:(bottom - y) * n, (left - x) * n:(right - x) * n]
            cut(out, top, bottom, left, right).copy_(inner)


STEPS, PATCH, CONTEXT = 6, 512, 64      # the defaults, chosen on photographs held out of training
RELATIVE_ETA = 1.5                      # likewise, in units of the residual's standard deviation


def fast_bf16(device):
    """Whether bfloat16 is worth it: on GPUs of the last years, and on CPUs that are faster in it
    than in float32: AMD's with AVX-512 are, Intel's without AMX are not (with AMX: not
    measured)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    amd = known.get("avx512_bf16") and "AMD" in known.get("cpu_name", "")
    return bool(known.get("amx_bf16") or amd)


def sample_picture(diffusion, x_hat, q, energy=None, steps=STEPS, sampler=None, seed=0, eta=None,
                   patch=PATCH, context=CONTEXT, on_step=lambda step: None, group=None, known=None):
    """Sample a picture of any size, patch by patch, given x_hat (1, 3, H, W), sides multiples of
    16.

    The patches move in step: each denoising step visits all of them, evaluates every one with
    `context` pixels around it, and keeps its centre; then the whole canvas goes on to the next
    noise level. With the U-Net's receptive field radius as context this *is* sampling the whole
    picture, at the memory of one patch; with none, seams show.

    q: level; energy: None or the HFD+ map, one value per CELL, (1, 1, H/16, W/16). sampler: one of
    SAMPLERS; None for "dpm", or for a flow "ddim", which is Euler's step. eta: shift of the
    schedule; None for RELATIVE_ETA times the residual's standard deviation: noise of the size of
    what is missing. The noise depends on `seed` alone: it is drawn on the CPU, for all of the
    picture. group, known: see sample_in_groups. Returns (1, 3, H, W) in [-1, 1]."""
    device, bf16, generator = x_hat.device, fast_bf16(x_hat.device), torch.Generator()
    generator.manual_seed(seed)
    level, canvas = torch.tensor([q], device=device), torch.empty_like(x_hat)       # (1, 3, H, W)
    given = [x_hat, energy] if energy is not None and diffusion.config.kind == "plus" else [x_hat]
    sampler = sampler or ("ddim" if diffusion.config.objective == "flow" else "dpm")
    eta = eta or RELATIVE_ETA * diffusion.residual_std[q].square().mean().sqrt().item()

    def noise():
        """A standard normal tensor (1, 3, H, W)."""
        return torch.randn(x_hat.shape, generator=generator, dtype=x_hat.dtype).to(device)

    def predict_x(z, log_snr):
        """E[x | z_t, given] of the whole canvas; outside of the group, if any, what is known."""
        now = log_snr.to(device, x_hat.dtype)[None]                                 # (1,)

        def denoise(z, *given):
            """One patch (1, 3, ., .)."""
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return diffusion.predict_x(z, now, level, *given)
        if known is not None:
            canvas.copy_(known)
        apply_tiled(denoise, [z, *given], canvas, patch, context, group)
        return canvas

    schedule = functools.partial(diffusion.schedule, eta=eta)
    return sample(predict_x, steps, SAMPLERS[sampler](), schedule, noise, on_step).clamp_(-1, 1)


def sample_in_groups(diffusion, x_hat, q, seed=0, on_step=lambda step: None, **settings):
    """The paper's way, for it may not rely on a local network. As sample_picture, but four groups
    of patches that do not touch take turns, each going all the way from noise to picture.

    Elsewhere the denoiser's x is replaced by what earlier groups made, or by x_hat where nothing is
    made yet, so that z_t there has the right noise level. An approximation: early groups cannot
    know what late ones will do."""
    known = x_hat
    for n, turn in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        def group(row, column):
            """Whether this patch has its turn."""
            return (row % 2, column % 2) == turn

        def report(step):
            """Steps done, of all groups together."""
            on_step((n * settings.get("steps", STEPS) + step) / 4)
        known = sample_picture(diffusion, x_hat, q, seed=4 * seed + n, group=group, known=known,
                               on_step=report, **settings)
    return known


# A model is a folder of arrays: autoencoder.npz and, after stage 2, denoiser.npz ------------------


class HFDError(Exception):
    """Something the user can put right. One line: what is wrong, with which file, what to do."""


def write_atomically(path, write):
    """Call write(f) on a temporary file, then rename it: `path` is always complete, old or new. A
    link is followed, and a file that was there keeps its mode. HFDError if that fails."""
    path = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), f".hfd-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        if not error.errno:                                 # not the system's but Pillow's
            raise
        raise HFDError(f"{path}: cannot be written ({error.strerror}); make room, or name another "
                       "place") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_archive(path, about, arrays):
    """Write {name: tensor or NumPy array} and `about`, a dictionary that JSON can hold."""
    arrays = {name: a.cpu().numpy() if torch.is_tensor(a) else a for name, a in arrays.items()}
    arrays["json"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    write_atomically(path, lambda f: np.savez(f, **arrays))


def read_archive(path):
    """(about, {name: NumPy array}). Nothing in the file can run, and it unpacks to no more than its
    own size. HFDError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError
        with warnings.catch_warnings(action="ignore"), np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return dict(json.loads(arrays.pop("json").tobytes())), arrays
    except FileNotFoundError:
        raise HFDError(f"{path}: no such file; name another model, or train one") from None
    except Exception as error:          # the many ways in which a damaged file can fail to unpack
        raise HFDError(f"{path}: not part of an HFD model ({type(error).__name__})") from None


def save_part(path, network, recipe, **more):
    """Write what ships of a stage: matrices in half precision, an autoencoder's prior frozen to
    integer tables. recipe: how it was made; more: what else to tell."""
    arrays = {f"weights.{name}": t.half() if name.endswith("weight") else t
              for name, t in network.state_dict().items()}
    if isinstance(network, Autoencoder):
        tables = network.prior.freeze(network.log_step.exp())
        arrays |= {f"tables.{name}": a for name, a in vars(tables).items()}
    about = {"format": "hfd 1", "config": asdict(network.config), "recipe": recipe, **more}
    write_archive(path, about, arrays)


def load_part(path, config_kind, device):
    """(network, text, tables by name) of an archive, or ValueError and the like. The network is
    built on torch's device "meta" first, where tensors have no memory: a forged file may ask for
    any."""
    about, arrays = read_archive(path)
    if about["format"] != "hfd 1":
        raise ValueError("it was written by another version")
    config = config_kind(**{name: tuple(value) if isinstance(value, list) else value
                            for name, value in about["config"].items()})
    kind = Autoencoder if config_kind is AutoencoderConfig else DENOISERS[config.kind]
    numbers = np.concatenate([np.atleast_1d(value) for name, value in vars(config).items()
                              if name not in ("prior", "kind", "objective", "norm")])
    stages = len(config.widths)
    if not ((numbers >= 0) & (numbers <= 1024)).all() or not len(config.blocks) == stages <= 4 or (
            len(numbers) > 64 or sum(config.blocks) > 64):
        raise ValueError("its configuration cannot be meant")
    with torch.device("meta"):
        asked = {f"weights.{name}": t.shape for name, t in kind(config).state_dict().items()}
    weights = {name: a for name, a in arrays.items() if name.startswith("weights.")}
    if asked != {name: a.shape for name, a in weights.items()}:
        raise ValueError("its weights do not fit its configuration")
    if not all(a.dtype.name in ("float16", "float32") and np.isfinite(a).all()
               for a in weights.values()):
        raise ValueError("its weights are not numbers")
    network = kind(config).float()
    network.load_state_dict({name.removeprefix("weights."): torch.from_numpy(a.astype(np.float32))
                             for name, a in weights.items()})
    network.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return network, about, {name.removeprefix("tables."): arrays[name] for name in arrays
                            if name.startswith("tables.")}


@dataclass
class Model:
    """A loaded model. identity: 4 bytes that name the autoencoder, by its weights and tables: what
    a file's latent depends on; recipes: how each part was made; diffusion: None after stage 1."""
    device: torch.device
    autoencoder: Autoencoder
    tables: entropy.Tables
    identity: bytes
    recipes: dict
    diffusion: Diffusion = None


def load_model(folder, device="cpu"):
    """The Model in a folder; it carries its configuration. HFDError if it cannot be used."""
    path = os.path.join(folder, "autoencoder.npz")
    try:
        autoencoder, about, tables = load_part(path, AutoencoderConfig, device)
        tables = entropy.TABLES[autoencoder.config.prior](**tables).validate()
        if tables.octaves.shape != autoencoder.log_step.shape or (
                len(autoencoder.config.widths) != 4):
            raise ValueError("its parts do not belong together")
        weights = [t.cpu().numpy() for t in autoencoder.state_dict().values()]
        data = b"".join(a.tobytes() for a in (*weights, *vars(tables).values()))
        model = Model(torch.device(device), autoencoder, tables, hashlib.sha256(data).digest()[:4],
                      {"autoencoder": about["recipe"]})
        path = os.path.join(folder, "denoiser.npz")
        if os.path.exists(path):
            diffusion, about, _ = load_part(path, DiffusionConfig, device)
            config, Q = diffusion.config, len(autoencoder.lambdas)
            if (about["autoencoder"], config.levels) != (model.identity.hex(), Q):
                raise ValueError("it was trained for another autoencoder than the one beside it")
            if config.objective not in SCHEDULES:
                raise ValueError(f"its objective is {config.objective}")
            model.diffusion, model.recipes["denoiser"] = diffusion, about["recipe"]
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise HFDError(f"{path}: cannot be used ({' '.join(str(error).split())[:120]})") from None
    return model
