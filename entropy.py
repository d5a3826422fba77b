"""Bits: from the probability of a latent to the bytes of a file, and back.

A latent y has been rounded to integers k. Part I codes these without loss, and is three ideas long:

1. A *factorized prior* (Balle et al. 2018, appendix 6.1) gives every latent channel a learned
   distribution. An integer's probability is what lies in its bin, however wide the bins are.
2. *Integer tables*. A decoder on another machine must reach exactly the same probabilities, and
   floating point does not promise that. So when training saves, the prior is frozen to integers.
3. A *range coder* (Martin 1979) turns symbols and tables into bytes, within a fraction of a per
   cent of the cross-entropy under these tables.

Part II goes beyond the minimum: a *context model* moves and widens the prior symbol by symbol. M
channels, Q quality levels; latents are (B, M, h, w) of B pictures or (M, h, w) of one.
"""
import copy
import functools
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Part I. A complete codec for latents =============================================================
# 1. The factorized prior --------------------------------------------------------------------------
WIDTHS, FINEST = 49, -24        # of the tables below: 2^(FINEST / 4) and so on, four to an octave
LIMITS = FINEST / 4, (FINEST + WIDTHS - 1) / 4          # the same in octaves


class FactorizedPrior(nn.Module):
    """The probability of every symbol, by itself: no symbol looks at its neighbours.

    One cumulative distribution function (CDF) per channel, c_m(y) = c(y / width_m). Its shape is a
    mixture of three logistics around zero, learned once for all channels:

        c(y) = sum_i w_i sigmoid(y / s_i),   sum_i w_i = 1,   s_i > 0

    It has a sharp peak and heavy tails, as transform coefficients have, and is a CDF without any
    constraint. (Balle et al. 2018 use a small monotone network: more flexible, several times
    slower, and slower to learn in our trials.) In steps, where symbols are integers,

        P(k) = c((k + 1/2) / width) - c((k - 1/2) / width),   width = width_m / step

    so one prior serves every step, and every quality level (`by_level`: it may differ a little)."""

    def __init__(self, channels, levels):
        super().__init__()
        narrow_to_wide = torch.linspace(math.log(0.25), math.log(2.5), 3)
        self.logits = nn.Parameter(torch.zeros(3))                      # (3,) of the w_i
        self.log_widths = nn.Parameter(narrow_to_wide)                  # (3,) of the s_i
        self.octaves = nn.Parameter(torch.zeros(channels))              # (M,) log2 width_m
        self.by_level = nn.Parameter(torch.zeros(levels, channels))     # (Q, M) added at each level

    @torch.no_grad()
    def fit_scale(self, y):
        """Start at width_m = mean |y_m| of latents y (B, M, h, w), for these differ a hundredfold:
        without this the first thousand steps learn nothing else."""
        self.octaves.copy_(y.abs().mean(dim=(0, 2, 3)).clamp_min(1e-3).log2())

    def likelihood(self, u, width):
        """P(symbol in [u - 1/2, u + 1/2]) at this width > 0, in [0, 1]. Shapes broadcast."""
        # Far to the right both sigmoids are 1 - tiny, and their difference is rounding noise. Far
        # to the left both are small. The shape is symmetric: so look at the mirror image there.
        u, p = -u.abs(), 0.0
        for w, s in zip(self.logits.softmax(0), self.log_widths.exp()):
            upper, lower = (u + 0.5) / (s * width), (u - 0.5) / (s * width)
            p = p + w * (torch.sigmoid(upper) - torch.sigmoid(lower))
        return p

    def usual_octaves(self, step, q):
        """log2 of each channel's width in symbols, (B, M, 1, 1). step: (B, M, 1, 1); q: (B,)."""
        return limited((self.octaves + self.by_level[q])[:, :, None, None] - torch.log2(step))

    def where(self, k, step, q):
        """(mu, width): where each symbol is expected, and how widely. Here 0 and (B, M, 1, 1)."""
        return 0.0, torch.exp2(self.usual_octaves(step, q))

    def bits(self, u, k, step, q):
        """What an ideal coder would spend on each element of u, in bits: (B, M, h, w). u: in steps;
        k: what a context is taken from, as u (in training one is noisy and the other rounded, see
        hfd.Autoencoder.forward); step: (B, M, 1, 1); q: (B,)."""
        mu, width = self.where(k, step, q)
        return -torch.log2(self.likelihood(u - mu, width) + 2.0 ** -30)     # strays escape

    @torch.no_grad()
    def freeze(self, steps):
        """This prior as integer Tables, for quantization steps (Q, M)."""
        prior, steps = copy.deepcopy(self).cpu().double(), steps.cpu().double()[:, :, None, None]
        octaves = prior.usual_octaves(steps, torch.arange(len(steps)))[:, :, 0, 0]  # (Q, M)
        octaves = (octaves * OCTAVE).round().int().numpy()                          # (Q, M)
        return Tables(*cumulative_counts(prior, [0]), octaves).validate()


def limited(octaves):
    """Octaves, clamped to LIMITS. Beyond them 1 % of the gradient is left (within, it has 101 %),
    so that strays return."""
    return octaves.clamp(*LIMITS) + 0.01 * (octaves - octaves.detach())


# 2. Integer tables --------------------------------------------------------------------------------
# All channels share one shape, so one family of tables, of WIDTHS widths, serves every symbol. Each
# entry needs a count of at least 1. Out of 2^16, with an entry for every symbol, these would take
# 3 % of the probability, 0.05 bits a symbol: at low rates most symbols cost less than that. So
# counts are out of 2^24, and only likely symbols have an entry; the others share one, the *escape*.

PRECISION = 24
TOTAL = 1 << PRECISION          # all counts of a table
MAX_SYMBOL = 1023               # larger ones always escape
OCTAVE = 64                     # what an octave is in integers


def cumulative_counts(prior, shifts):
    """(low, size, start, cdf) of `Tables`: for each of WIDTHS widths one table for every mu in
    `shifts`. Symbols with a probability of at least 2^-22 have an entry of their own."""
    k = torch.arange(-MAX_SYMBOL, MAX_SYMBOL + 1, dtype=torch.float64)              # (K,)
    low, cdf = [], []
    for width, mu in product(range(FINEST, FINEST + WIDTHS), shifts):
        p = prior.likelihood(k - mu, 2.0 ** (width / 4)).numpy()                    # (K,)
        likely = np.flatnonzero(p >= 2.0 ** (2 - PRECISION))
        first, last = likely.min(initial=MAX_SYMBOL), likely.max(initial=MAX_SYMBOL)    # and k = 0
        p = p[first:last + 1]
        p = np.append(p, max(1 - p.sum(), 0))               # the escape
        # One count each, the rest by probability; what rounding down leaves over, to the likeliest.
        counts = 1 + np.floor(p / p.sum() * (TOTAL - len(p))).astype(np.int64)
        counts[counts.argmax()] += TOTAL - counts.sum()
        low.append(first - MAX_SYMBOL)
        cdf.append(np.concatenate([[0], counts.cumsum()]))
    size = np.array([len(table) - 1 for table in cdf])                              # (T,)
    start = np.cumsum(size + 1) - (size + 1)                                        # (T,)
    return [np.asarray(a, np.int32) for a in (low, size, start, np.concatenate(cdf))]


def table_of(octaves):
    """The number of the width that is nearest to 2^(octaves / OCTAVE); octaves: integer array."""
    return np.clip((octaves + OCTAVE // 8) // (OCTAVE // 4) - FINEST, 0, WIDTHS - 1)


@dataclass
class Tables:
    """A frozen prior. Table n covers the symbols low[n] .. low[n] + size[n] - 2 and, last, the
    escape. Its size[n] + 1 cumulative counts, from 0 to 2^24, begin at cdf[start[n]]."""
    low: np.ndarray         # (T,) int32, the smallest symbol; never above 0
    size: np.ndarray        # (T,) int32, number of entries, the escape included
    start: np.ndarray       # (T,) int32, where the table begins in cdf
    cdf: np.ndarray         # (sum of sizes + 1 each,) int32
    octaves: np.ndarray     # (Q, M) int32, log2 of the width in symbols, in 1 / OCTAVE

    SHIFTS = 1              # tables per width
    TYPES = (np.int32,) * 5

    def validate(self):
        """Return self, or raise ValueError unless the coder can use the tables safely."""
        arrays, T = list(vars(self).values()), WIDTHS * self.SHIFTS
        if [a.dtype for a in arrays] != list(self.TYPES):
            raise ValueError("tables are not made of integers of the right size")
        low, size, start, cdf = (a.astype(np.int64) for a in arrays[:4])
        high, length = low + size - 2, size + 1             # high: the largest symbol with an entry
        if not (low.shape == size.shape == start.shape == (T,) and cdf.shape == (length.sum(),)
                and ((-MAX_SYMBOL <= low) & (low <= 0) & (0 <= high) & (high <= MAX_SYMBOL)).all()
                and (start == length.cumsum() - length).all()                   # side by side
                and not cdf[start].any() and (cdf[start + size] == TOTAL).all()
                and (np.delete(np.diff(cdf), start[1:] - 1) > 0).all()):        # each by itself
            raise ValueError("the probability tables are damaged")
        # (Fewer than 2^14 channels of all levels: so sums in Part II are exact in float64.)
        if not 0 < self.octaves.size < 1 << 14 or np.abs(self.octaves / OCTAVE).max() > LIMITS[1]:
            raise ValueError("the prior has widths that there are no tables for")
        return self

    def walk(self, k, q, visit):
        """Go through a latent k, int64 (M, h, w), at level q in the order in which it is coded.

        If encoder and decoder ever differ, files are lost. So they share this loop, and hand in its
        middle: visit(which, values) codes values (n,) with the tables `which` (n,). An encoder
        returns the values that it was given; a decoder looks at `which` alone and returns what it
        reads, and k is filled with it."""
        which = table_of(self.octaves[q])                                           # (M,)
        for m, channel in enumerate(k):
            values = visit(np.full(channel.size, which[m]), channel.ravel())        # (h*w,)
            k[m] = values.reshape(channel.shape)


# 3. The range coder -------------------------------------------------------------------------------
# The message so far is an interval [low, low + range) of the unit interval, written as integers.
# Coding a symbol that owns the counts [start, start + freq) of TOTAL keeps that share of it, so a
# symbol of probability p shrinks it by p and costs -log2 p bits. Any number inside the last
# interval names the message. It needs ever more digits; but its leading bytes settle one after the
# other, and are written. What stays in hand obeys these invariants before every symbol:
#
#   2^56 <= range <= 2^64    so range // TOTAL >= 2^32, and rounding it down wastes < 2^-32 of it
#   low  <  2^65             64 bits and at most one carry, into the byte written last
#
# So what is written are digits to the base 256 that may be as large as 511, and `finish` makes
# bytes of them. (No carry leaves the first: low + range never grows past the interval's end.)

TOP, BOTTOM = 1 << 64, 1 << 56
BYTE = list(range(0, TOTAL + 1, TOTAL // 256))              # 256 equally likely values, for escapes


class RangeEncoder:
    """Collects symbols; `finish` returns the bytes. `bits`: the sum of their -log2 p."""

    def __init__(self):
        self.low, self.range, self.digits, self.bits = 0, TOP, [], 0.0

    def encode(self, starts, freqs):
        """Code symbols that own the counts [start, start + freq). Two lists of int."""
        low, range_ = self.low, self.range                  # local names: this is the hot spot
        for start, freq in zip(starts, freqs):
            unit = range_ >> PRECISION
            low += unit * start
            range_ = unit * freq
            while range_ < BOTTOM:
                self.digits.append(low >> 56)               # up to 511: a byte, and maybe a carry
                low = (low & (BOTTOM - 1)) << 8
                range_ <<= 8
        self.low, self.range = low, range_
        self.bits += float((PRECISION - np.log2(freqs)).sum())

    def finish(self):
        """The bytes of the message. The decoder reads up to 8 zeros past the end, so take the
        number in the interval that ends in the most zeros, and do not write them."""
        rounded = (-(-self.low >> zeros) << zeros for zeros in (64, 56))        # up: both >= low
        value = next(value for value in rounded if value < self.low + self.range)
        bytes_, carries = bytes(d & 255 for d in self.digits), bytes(d >> 8 for d in self.digits)
        message = (int.from_bytes(bytes_) << 64) + (int.from_bytes(carries) << 72) + value
        message = message.to_bytes(len(bytes_) + 8)
        return message[:-8] + message[-8:].rstrip(b"\0")


class RangeDecoder:
    """Mirrors RangeEncoder, with code = message - low in place of low, so that there is no carry.
    0 <= code < range if an encoder wrote the data; other data raises ValueError, or decodes."""

    def __init__(self, data):
        self.data, self.position = data + bytes(8), 8       # an encoder leaves out 8 zeros at most
        self.code, self.range = int.from_bytes(self.data[:8]), TOP

    def decode(self, cdfs):
        """The next symbols, as indices into their tables: the lists [0, ..., TOTAL] in cdfs."""
        code, range_, data, position, indices = self.code, self.range, self.data, self.position, []
        for cdf in cdfs:
            unit = range_ >> PRECISION
            index = bisect_right(cdf, code // unit) - 1     # the entry whose counts hold the code
            if index == len(cdf) - 1:
                raise ValueError("the range-coded data is damaged")
            code -= unit * cdf[index]
            range_ = unit * (cdf[index + 1] - cdf[index])
            while range_ < BOTTOM:
                if position == len(data):
                    raise ValueError("the range-coded data ends too early")
                code = code << 8 | data[position]
                position += 1
                range_ <<= 8
            indices.append(index)
        self.code, self.range, self.position = code, range_, position
        return indices


def encode(k, tables, q):
    """(bytes, ideal bits) of an integer latent k (M, h, w), |k| < 2^29, at quality level q. The
    bits are the cross-entropy; the bytes come within 0.2 % and a few bytes of them."""
    coder = RangeEncoder()

    def write(which, values):
        """Code values (n,) with the tables `which` (n,), and return them."""
        index, escape = values - tables.low[which], tables.size[which] - 1          # (n,) each
        outside = (index < 0) | (index >= escape)                                   # (n,)
        entry = tables.start[which] + np.where(outside, escape, index)              # (n,)
        below = tables.cdf[entry]                                                   # (n,)
        coder.encode(below.tolist(), (tables.cdf[entry + 1] - below).tolist())
        escaped = values[outside].astype(">i4").tobytes()   # in full: too rare for bytes to matter
        coder.encode([BYTE[byte] for byte in escaped], [BYTE[1]] * len(escaped))
        return values
    tables.walk(np.array(k, np.int64), q, write)
    return coder.finish(), coder.bits


def decode(data, tables, q, shape):
    """The inverse of `encode`: bytes to an int64 array of shape (M, h, w). ValueError on damage."""
    coder, k = RangeDecoder(data), np.zeros(shape, np.int64)                        # (M, h, w)
    cdfs = [cdf.tolist() for cdf in np.split(tables.cdf, tables.start[1:])]

    def read(which, _):
        """The next values (n,), with the tables `which` (n,)."""
        index = np.array(coder.decode([cdfs[n] for n in which.tolist()]), np.int64)         # (n,)
        values = index + tables.low[which]                                          # (n,)
        for i in np.flatnonzero(index == tables.size[which] - 1):
            values[i] = int.from_bytes(bytes(coder.decode([BYTE] * 4)), signed=True)
        return values
    tables.walk(k, q, read)
    return k


# Part II. Beyond the minimum: what a symbol says about those that follow ==========================
# 4. The context model -----------------------------------------------------------------------------
# First, how large they will be: there is grass here, or sky. With magnitudes |k| in units of their
# channel's usual width, and weights >= 0 (Buccigrossi & Simoncelli 1999 have this for wavelets),
#
#     width *= 2^by_pass (1 + across . magnitudes of the channels before, in the same cell
#                           + window . their means over 3x3 cells, zero beyond the border
#                           + near * the mean of those of up to four neighbours in its channel)
#
# Second, where they will be: mu is `shift` times the mean of the four neighbours. That matters for
# few channels, but for these much: neighbouring blocks differ little in their mean colour, which is
# why even JPEG codes only the differences. (ELIC, He et al. 2022, has networks for both.)
#
# Neighbours on all four sides can only be known if cells are not coded row by row. So each channel
# goes from coarse to fine: first one cell in eight in each direction. Then the middle of every
# square of these, between four corners; then the middle of every side, between four again. Now it
# is one in four, and so on. Half of all cells come last, between four.

REACH = 8                                   # cells between those that come first
PASSES = 1 + 2 * 3                          # those, and two whenever that distance is halved
CORNERS = np.array([(-1, -1, 1, 1), (-1, 1, -1, 1)])[..., None]                     # (2, 4, 1)
SIDES = np.array([(-1, 1, 0, 0), (0, 0, -1, 1)])[..., None]                         # (2, 4, 1)


@functools.lru_cache(8)
def coarse_to_fine(h, w, device="cpu"):
    """(turn, around, share) of the cells of an (h, w) channel, which are numbered row by row. turn:
    (h*w,) the pass, 0 .. PASSES - 1, in which each is coded; around: (4, h*w) the numbers of its
    neighbours known by then, h*w in place of one beyond the border, and of all in the first pass;
    share: (h*w,) 12 / (how many there are): means of 1 to 4 are whole in twelfths."""
    i, j = np.divmod(np.arange(h * w), w)                                           # (h*w,) each
    gap = np.gcd(np.gcd(i, j), REACH)                       # (h*w,) to the neighbours: 8, 4, 2, 1
    middle = i // gap % 2 & j // gap % 2                    # (h*w,) of a square: 1; of a side: 0
    turn = np.where(gap < REACH, 2 * np.log2(REACH / gap).astype(int) - middle, 0)  # (h*w,)
    di, dj = REACH + gap * np.where(middle, CORNERS, SIDES)                         # (4, h*w) each
    number = np.pad(np.arange(h * w).reshape(h, w), REACH, constant_values=h * w)
    around = np.asfortranarray(number[i + di, j + dj])      # (4, h*w), the four side by side
    around[:, turn == 0] = h * w
    share = 12 // np.maximum((around < h * w).sum(0), 1)                            # (h*w,)
    return [torch.from_numpy(a).to(device) for a in (turn, around, share)]


class ContextPrior(FactorizedPrior):
    """A factorized prior that is told where each symbol will lie, and how widely. P passes."""

    def __init__(self, channels, levels):
        super().__init__(channels, levels)
        self.by_pass = nn.Parameter(torch.zeros(PASSES, channels))                  # (P, M) octaves
        self.shift = nn.Parameter(torch.zeros(PASSES, channels))                    # (P, M)
        self.near = nn.Parameter(torch.full((PASSES, channels), 0.25))              # (P, M)
        # (M, M) each, of which only the part below the diagonal is used: the channels before.
        self.across = nn.Parameter(torch.full((channels, channels), 0.25 / channels))
        self.window = nn.Parameter(torch.full((channels, channels), 0.25 / channels))

    def where(self, k, step, q):
        """(mu, width), each (B, M, h, w): of symbols k (B, M, h, w), given those before them."""
        octaves = self.usual_octaves(step, q)                                       # (B, M, 1, 1)
        magnitude = (k.abs() * torch.exp2(-octaves)).clamp_max(LARGEST).flatten(2)  # (B, M, h*w)
        here, about = (weight.abs().tril(-1) @ magnitude
                       for weight in (self.across, self.window))                    # (B, M, h*w)
        about = F.avg_pool2d(about.view(k.shape), 3, stride=1, padding=1).flatten(2)  # (B, M, h*w)
        # In its own channel. Beyond the border, in cell h*w, is a zero.
        turn, around, share = coarse_to_fine(*k.shape[2:], k.device)    # (h*w,), of around (4, h*w)
        # (index_select's gradient adds; that of [..., around] would sort all the numbers first.)
        mean, large = (F.pad(of, (0, 1)).index_select(2, around.flatten())
                       .unflatten(2, around.shape).sum(2) * share / 12
                       for of in (k.flatten(2), magnitude))                         # (B, M, h*w)
        weights = self.by_pass, self.shift, self.near.abs()                         # (P, M) each
        by_pass, shift, near = (a.T[:, turn] for a in weights)                      # (M, h*w) each
        total = 1 + here + about + near * large                                     # (B, M, h*w)
        octaves = limited(octaves.flatten(2) + by_pass + torch.log2(total))         # (B, M, h*w)
        return (shift * mean).view(k.shape), torch.exp2(octaves).view(k.shape)

    @torch.no_grad()
    def freeze(self, steps):
        """This prior as integer ContextTables, for quantization steps (Q, M)."""
        octaves, prior = super().freeze(steps).octaves, copy.deepcopy(self).cpu().double()
        by_pass = (prior.by_pass * OCTAVE).round().int().numpy()                    # (P, M)
        others = prior.near.abs(), prior.across.abs().tril(-1), prior.window.abs().tril(-1)
        weights = prior.shift * UNIT, *(weight * WEIGHT for weight in others)
        weights = [a.round().clamp(-1 << 15, (1 << 15) - 1).short().numpy() for a in weights]
        counts = cumulative_counts(prior, np.arange(-SHIFTS // 2, SHIFTS // 2) / SHIFTS)
        return ContextTables(*counts, octaves, by_pass, *weights).validate()


# 5. The same walk in exact integers ---------------------------------------------------------------
SHIFTS = 8                  # mu is rounded to eighths: so many tables per width
MAGNITUDE = 1 << 12         # a magnitude of 1, a whole width, in integers
LARGEST = 1 << 12           # larger ones count as this
WEIGHT = 1 << 12            # a magnitude's weight of 1; they have 16 bits, so they are below 8
UNIT = 1 << 14              # a mean's weight of 1; they lie between -2 and 2

# Logarithms without a floating-point library: POWERS[i] is 2^((i - 1/2) / OCTAVE), rounded down. In
# the topmost octave these are 128th roots, seven square roots in a row; below, halves of those.
_topmost = [1 << 128 * 61 + 2 * i - 1 for i in range(OCTAVE)]
for _ in range(7):
    _topmost = [math.isqrt(power) for power in _topmost]
POWERS = np.array([power >> 61 - octave for octave in range(62) for power in _topmost])


def octaves_of(n):
    """OCTAVE * log2 n, rounded, of integers n from 1 to 2^61: an array."""
    return np.searchsorted(POWERS, n) - 1


@dataclass
class ContextTables(Tables):
    """A frozen ContextPrior: SHIFTS tables per width, and weights."""
    by_pass: np.ndarray     # (P, M) int32, what each pass adds to the octaves, in 1 / OCTAVE
    shift: np.ndarray       # (P, M) int16, weight of the neighbours' mean, in 1 / UNIT
    near: np.ndarray        # (P, M) int16, weight of their mean magnitude, in 1 / WEIGHT, >= 0
    across: np.ndarray      # (M, M) int16, likewise: of channel j's magnitude for channel i > j
    window: np.ndarray      # (M, M) int16, likewise: of its mean over 3x3 cells

    SHIFTS = SHIFTS
    TYPES = (np.int32,) * 6 + (np.int16,) * 4

    def validate(self):
        """Return self, or raise ValueError unless coder and context model are safe to use."""
        super().validate()
        M = self.octaves.shape[1]
        if [a.shape for a in list(vars(self).values())[5:]] != [(PASSES, M)] * 3 + [(M, M)] * 2:
            raise ValueError("the context model has the wrong shape")
        # So no sum leaves 64 bits. In each pass a symbol is at most twice its neighbours' mean and
        # 2^31 more, so below 2^39 after seven; its magnitude, in units of the narrowest width, is
        # below 2^57, its share of mu below 2^61, a weighted sum of 9 M of them below 2^57.
        if min(a.min() for a in (self.near, self.across, self.window)) < 0:
            raise ValueError("the context model weighs with less than nothing")
        return self

    def walk(self, k, q, visit):
        """As Tables.walk: channel by channel, and within each from coarse to fine."""
        M, h, w = k.shape
        octaves = self.octaves[q]                                                   # (M,)
        one_in_widths = MAGNITUDE * POWERS[20 * OCTAVE - octaves] >> 20     # (M,) of a symbol of 1
        # Float64 has the fast matrix products, exact for integers: sums are < M 2^15 2^24 < 2^53.
        weights = np.stack([self.across, self.window], axis=1).astype(np.float64)   # (M, 2, M)
        known = np.empty((M, h * w))                        # magnitudes: the channels before
        turn, *neighbours = (a.numpy() for a in coarse_to_fine(h, w))   # (h*w,); (4, h*w), (h*w,)
        passes = [(cells, *(a[..., cells] for a in neighbours))
                  for cells in map(np.flatnonzero, turn == np.arange(PASSES)[:, None])]     # (n,)
        one = WEIGHT * MAGNITUDE                            # a magnitude of 1, a weight of 1
        for m in range(M):
            here, about = (weights[m, :, :m] @ known[:m]).astype(np.int64)          # (h*w,) each
            about = np.pad(about.reshape(h, w), 1)                                  # (h+2, w+2)
            windows = np.lib.stride_tricks.sliding_window_view(about, (3, 3))       # (h, w, 3, 3)
            total = one + here + windows.sum((2, 3)).ravel() // 9                   # (h*w,)
            values = np.append(k[m], 0)     # (h*w + 1,), the last one stands for the border
            magnitudes = np.zeros_like(values)                                      # (h*w + 1,)
            for n, (cells, around, share) in enumerate(passes):
                large = magnitudes[around].sum(0) * share                           # (n,)
                wide = total[cells] + large * self.near[n, m] // 12                 # (n,)
                octave = octaves_of(wide) - octaves_of(one) + octaves[m] + self.by_pass[n, m]
                # mu, a whole part and -4 .. 3 eighths. With 2.7, rounded to 22 eighths, these are 3
                # and -2: so k - 3 is coded with table number 2 of 0 .. 7, the one for -2/8.
                mu = values[around].sum(0) * share * self.shift[n, m]    # (n,) in 1 / (12 UNIT)
                eighths = (mu * SHIFTS + 6 * UNIT) // (12 * UNIT)                   # (n,)
                part, number = np.divmod(eighths + SHIFTS // 2, SHIFTS)             # (n,) each
                which = table_of(octave) * SHIFTS + number                          # (n,)
                values[cells] = part + visit(which, values[cells] - part)
                large = np.abs(values[cells]) * one_in_widths[m]                    # (n,)
                magnitudes[cells] = np.minimum(large, MAGNITUDE * LARGEST)
            k[m], known[m] = values[:-1].reshape(h, w), magnitudes[:-1]


PRIORS = {"factorized": FactorizedPrior, "context": ContextPrior}
TABLES = {"factorized": Tables, "context": ContextTables}

# 6. A small map -----------------------------------------------------------------------------------
# HFD+ (hfd.residual_energy) has a map of levels, small and smooth: a latent of one channel. Each
# entry is coded given its left neighbour; at the left edge, the one above; at first, the middle
# level. Probability halves with every unit of distance: there is nothing to learn.


class MapTables(Tables):
    """Table n is for an entry whose neighbour has level n. Nothing escapes: that has no counts."""

    def __init__(self, levels):
        n = np.arange(levels)
        weights = 1 << levels - np.abs(n - n[:, None])                              # (T, T)
        cdf = TOTAL * weights.cumsum(1) // weights.sum(1, keepdims=True)            # (T, T)
        cdf = np.hstack([0 * cdf[:, :1], cdf, cdf[:, -1:]])                         # (T, T + 2)
        super().__init__(0 * n, 0 * n + levels + 1, n * (levels + 2), cdf.ravel(), None)

    def walk(self, k, q, visit):
        """As Tables.walk, of a map k, int64 (1, h, w): entry by entry."""
        for i, j in np.ndindex(k.shape[1:]):
            before = k[0, i, j - 1] if j else k[0, i - 1, 0] if i else len(self.low) // 2
            k[0, i, j:j + 1] = visit(np.array([before]), k[0, i, j:j + 1])
