"""Bits: from the probability of a latent to the bytes of a file, and back.

An image codec ends in a short lossless step: the latent y has been rounded to integers k, and they
must become as few bytes as possible. Part I is complete by itself, and three ideas long:

1. A *factorized prior* (Balle et al. 2018, appendix 6.1) gives every latent channel a learned
   distribution. An integer's probability is what lies in its bin, however wide the bins are.
2. *Integer tables*. A decoder on another machine must reach exactly the same probabilities, and
   floating point does not promise that. So when training saves, the prior is frozen to integers.
3. A *range coder* (Martin 1979) turns symbols and tables into bytes, within a fraction of a per
   cent of the cross-entropy, which is what the bits in the training's loss estimate.

Part II goes beyond the minimum: a *context model* moves and widens the prior symbol by symbol, and
a small map carries the side information of HFD+.

M channels, Q quality levels; latents are (B, M, h, w) of B pictures, or (M, h, w) of one.
"""
import copy
import functools
import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Part I. A complete codec for latents =============================================================
# 1. The factorized prior

WIDTHS, FINEST = 49, -24        # of the tables below: 2^(FINEST / 4) and so on, four to an octave
LIMITS = FINEST / 4, (FINEST + WIDTHS - 1) / 4          # the same in octaves


class FactorizedPrior(nn.Module):
    """The probability of every symbol, by itself: no symbol looks at its neighbours.

    One continuous cumulative distribution function (CDF) per channel, c_m(y) = c(y / width_m). Its
    shape is a mixture of three logistics around zero, learned once for all channels,

        c(y) = sum_i w_i sigmoid(y / s_i),   sum_i w_i = 1,   s_i > 0:

    a sharp peak with heavy tails, as transform coefficients have it. A mixture of CDFs is a CDF, so
    nothing has to be constrained. (Balle et al. 2018 use a small monotone network: more flexible,
    several times slower, and slower to learn in our trials.) In units of the quantization step,
    where symbols are integers,

        P(k) = c((k + 1/2) / width) - c((k - 1/2) / width),   width = width_m / step.

    The prior is continuous, so one prior serves every step, and with it every quality level (whose
    widths may differ a little: `by_level`).
    """

    def __init__(self, channels, levels, components=3):
        super().__init__()
        narrow_to_wide = torch.logspace(math.log10(0.25), math.log10(2.5), components)
        self.logits = nn.Parameter(torch.zeros(components))             # (K,) of the w_i
        self.log_widths = nn.Parameter(narrow_to_wide.log())            # (K,) of the s_i
        self.octaves = nn.Parameter(torch.zeros(channels))              # (M,) log2 width_m
        self.by_level = nn.Parameter(torch.zeros(levels, channels))     # (Q, M) added at each level

    @torch.no_grad()
    def fit_scale(self, y):
        """Start every channel at its own size: width_m = mean |y_m| over latents y (B, M, h, w).

        Channels differ a hundredfold (the mean colour of a block against its finest ripple).
        Without this the first thousand steps only teach the prior how large the numbers are."""
        self.octaves.copy_(y.abs().mean(dim=(0, 2, 3)).clamp_min(1e-3).log2())

    def likelihood(self, u, width):
        """P(symbol falls in [u - 1/2, u + 1/2]) under c at this width > 0. Any shapes that
        broadcast; returns theirs, values in [0, 1]."""
        # sum_i w_i (sigmoid((u + 1/2) / (s_i width)) - sigmoid((u - 1/2) / (s_i width))). Far to
        # the right both sigmoids are 1 - tiny, and their difference is rounding noise. As
        # sigmoid(a) - sigmoid(b) = sigmoid(-b) - sigmoid(-a), flip signs so that both are small.
        p = 0.0
        for w, s in zip(self.logits.softmax(0), self.log_widths.exp()):
            upper, lower = (u + 0.5) / (s * width), (u - 0.5) / (s * width)
            flip = torch.where(upper + lower > 0, -1.0, 1.0)
            p = p + w * (flip * (torch.sigmoid(flip * upper) - torch.sigmoid(flip * lower)))
        return p

    def usual_octaves(self, step, q):
        """log2 of each channel's width in symbols, (B, M, 1, 1). step: (B, M, 1, 1); q: (B,)."""
        return limited((self.octaves + self.by_level[q])[:, :, None, None] - torch.log2(step))

    def where(self, k, step, q):
        """(mu, width): around which value each symbol is expected, and how widely. Here 0, and the
        channel's own width (B, M, 1, 1); Part II has more to say."""
        return 0.0, torch.exp2(self.usual_octaves(step, q))

    def bits(self, u, k, step, q):
        """The bits that an ideal coder would spend, element by element: (B, M, h, w).

        u: (B, M, h, w), the values to code, in steps; k: (B, M, h, w), what a context is taken from
        (in training the one is noisy and the other rounded, see hfd.Autoencoder.forward); step: (B,
        M, 1, 1); q: (B,) levels. The 2^-30 that is added stands for the escape code (section 3): no
        symbol is infinitely expensive."""
        mu, width = self.where(k, step, q)
        return -torch.log2(self.likelihood(u - mu, width) + 2.0 ** -30)

    @torch.no_grad()
    def freeze(self, steps):
        """This prior as integer Tables, for quantization steps (Q, M)."""
        prior = copy.deepcopy(self).cpu().double()
        octaves = prior.octaves + prior.by_level - steps.detach().cpu().double().log2()     # (Q, M)
        octaves = whole(octaves.clamp(*LIMITS), OCTAVE, np.int32)
        return Tables(*cumulative_counts(prior, [0]), octaves).validate()


def limited(octaves):
    """Widths in octaves, clamped to those that there will be tables for. One per cent of the
    gradient passes everywhere, or a parameter that strayed outside would never come back."""
    return octaves.clamp(*LIMITS) + 0.01 * (octaves - octaves.detach())


# 2. Integer tables --------------------------------------------------------------------------------
# The prior's shape is one for all channels and levels, so one family of tables, of WIDTHS widths,
# serves every symbol: `octaves` says which of them. Every entry of a table needs a count of at
# least 1, taken from the others. Out of 2^16, and with an entry for every symbol, that would cost
# several per cent of the bits at low rates, where most channels are nearly always zero. So counts
# are out of 2^24, and only likely symbols have an entry; the others share an *escape*.

PRECISION = 24
TOTAL = 1 << PRECISION
MAX_SYMBOL = 1023               # larger ones always escape
OCTAVE = 64                     # what an octave is in integers


def whole(values, unit, dtype):
    """A float tensor in units of 1 / unit, rounded, clamped to what the NumPy integer type
    holds."""
    limits = np.iinfo(dtype)
    return (values * unit).round().clamp(limits.min, limits.max).numpy().astype(dtype)


def cumulative_counts(prior, shifts):
    """The tables (low, size, start, cdf) of `Tables`, for each of WIDTHS widths and, within a
    width, each mu of `shifts`. Symbols with a probability of at least 2^-22 get an entry of their
    own."""
    k = torch.arange(-MAX_SYMBOL, MAX_SYMBOL + 1, dtype=torch.float64)              # (K,)
    low, cdf = [], []
    for width in range(FINEST, FINEST + WIDTHS):
        for mu in shifts:
            row = prior.likelihood(k - mu, 2.0 ** (width / 4)).numpy()              # (K,)
            common = np.flatnonzero(row >= 2.0 ** (2 - PRECISION))
            first, last = common.min(initial=MAX_SYMBOL), common.max(initial=MAX_SYMBOL)    # with 0
            row = row[first:last + 1]
            row = np.append(row, max(1 - row.sum(), 0))                             # the escape
            # One count for being possible at all, the rest by probability. What rounding down left
            # over goes to the most likely entry, which notices least.
            counts = 1 + np.floor(row / row.sum() * (TOTAL - len(row))).astype(np.int64)
            counts[counts.argmax()] += TOTAL - counts.sum()
            low.append(first - MAX_SYMBOL)
            cdf.append(np.concatenate([[0], counts.cumsum()]))
    size = np.array([len(table) - 1 for table in cdf])
    start = np.cumsum(size + 1) - (size + 1)
    return [np.asarray(a, np.int32) for a in (low, size, start, np.concatenate(cdf))]


def table_of(octaves):
    """The number of the width that is nearest to 2^(octaves / OCTAVE); octaves: integer array."""
    return np.clip((octaves + OCTAVE // 8) // (OCTAVE // 4) - FINEST, 0, WIDTHS - 1)


@dataclass
class Tables:
    """A frozen prior: T tables of cumulative counts, as NumPy arrays.

    Table t covers the symbols low[t] .. low[t] + size[t] - 2 and, last, an escape for all others.
    Its size[t] + 1 cumulative counts 0, ..., 2^24 begin at cdf[start[t]].
    """
    low: np.ndarray         # (T,) int32, the smallest symbol; never above 0
    size: np.ndarray        # (T,) int32, number of entries, the escape included
    start: np.ndarray       # (T,) int32, where the table begins in cdf
    cdf: np.ndarray         # (sum of sizes + 1 each,) int32
    octaves: np.ndarray     # (Q, M) int32, log2 of the width in symbols, in 1 / OCTAVE

    SHIFTS = 1              # tables per width
    TYPES = (np.int32,) * 5

    def validate(self):
        """Return self, or raise ValueError unless the coder can use the tables safely."""
        arrays = vars(self).values()
        if [a.dtype for a in arrays] != list(self.TYPES) or self.octaves.ndim != 2:
            raise ValueError("tables are not made of integers of the right size")
        low, size, start, cdf = (a.astype(np.int64) for a in list(arrays)[:4])
        if any(a.shape != (WIDTHS * self.SHIFTS,) for a in (low, size, start)) or cdf.ndim != 1:
            raise ValueError("probability tables have the wrong shape")
        high, ends = low + size - 2, start + size + 1       # the largest symbol with an entry
        if np.minimum(-low, high).min() < 0 or np.maximum(-low, high).max() > MAX_SYMBOL:
            raise ValueError("a probability table does not hold the symbol 0, or holds too many")
        if start[0] != 0 or (start[1:] != ends[:-1]).any() or ends[-1] != len(cdf):
            raise ValueError("probability tables do not lie side by side")
        if cdf[start].any() or (cdf[start + size] != TOTAL).any():
            raise ValueError(f"a probability table does not run from 0 to {TOTAL}")
        if np.delete(np.diff(cdf), start[1:] - 1).min() <= 0:   # but from one table to the next
            raise ValueError("a probability table is not strictly increasing")
        clipped = np.clip(self.octaves, OCTAVE * LIMITS[0], OCTAVE * LIMITS[1])
        if not 0 < self.octaves.size < 1 << 14 or (clipped != self.octaves).any():
            raise ValueError("the prior has widths that there are no tables for")
        return self

    def walk(self, k, q, visit):
        """Go through a latent k, int64 (M, h, w), at level q in the order in which it is coded.

        visit(which, values): values (n,) are coded with the tables `which` (n,). An encoder is
        handed values and hands them back; a decoder returns what it reads, and k is filled with it.
        So both walk the same way."""
        which = table_of(self.octaves[q])                                           # (M,)
        for m, channel in enumerate(k):
            values = visit(np.full(channel.size, which[m]), channel.ravel())
            k[m] = values.reshape(channel.shape)


# 3. The range coder -------------------------------------------------------------------------------
# The message so far is an interval [low, low + range) of the unit interval, written as integers.
# Coding a symbol that owns the counts [start, start + freq) of TOTAL keeps that share of it, so a
# symbol of probability p shrinks it by p and costs -log2 p bits. Any number inside the last
# interval names the message.
#
# The interval would need ever more digits; but its leading bytes settle one after the other and can
# be sent away. What stays in hand obeys these invariants before every symbol:
#
#   2^56 <= range <= 2^64    so range // TOTAL >= 2^32, and rounding it down wastes < 2^-32 of it
#   low  <  2^65             64 bits plus at most one carry into the bytes already sent
#
# The carry: adding to `low` may overflow 2^64. Then one is added to the bytes already sent, as in
# school: every trailing 255 turns to 0, and the byte before goes up by one. There always is such a
# byte, because low + range never grows past the end of the interval it started in.

TOP, BOTTOM = 1 << 64, 1 << 56


class RangeEncoder:
    """Collects symbols; `finish` returns the bytes. `bits`: what an ideal coder would need for
    them, -log2 of each probability, added up."""

    def __init__(self):
        self.low, self.range, self.out, self.bits = 0, TOP, bytearray(), 0.0

    def encode(self, starts, freqs):
        """Code symbols: number i owns the counts [starts[i], starts[i] + freqs[i]). Lists of
        int."""
        low, range_, out = self.low, self.range, self.out   # local names: this is the hot spot
        for start, freq in zip(starts, freqs):
            unit = range_ >> PRECISION
            low += unit * start
            range_ = unit * freq
            while range_ < BOTTOM:
                if low >= TOP:
                    self._carry()
                    low -= TOP
                out.append(low >> 56)
                low = (low & (BOTTOM - 1)) << 8
                range_ <<= 8
        self.low, self.range = low, range_
        self.bits += float((PRECISION - np.log2(freqs)).sum())

    def _carry(self):
        i = len(self.out) - 1
        while self.out[i] == 255:
            self.out[i] = 0
            i -= 1
        self.out[i] += 1

    def finish(self):
        """The bytes of the message, as few as name it. The decoder reads up to 8 zeros past the
        end: so take the number in the interval that ends in the most zeros, and do not store
        them."""
        for kept in range(0, 72, 8):
            unit = 1 << (64 - kept)
            value = -(-self.low // unit) * unit             # the first multiple of unit >= low
            if value < self.low + self.range:
                break
        if value >= TOP:
            self._carry()
            value -= TOP
        return bytes(self.out) + value.to_bytes(8, "big").rstrip(b"\0")


class RangeDecoder:
    """Mirrors RangeEncoder step by step, with code = message - low in place of low: no carry
    occurs.

    Invariant: 0 <= code < range for bytes that an encoder wrote. Others raise ValueError, or decode
    to some symbols."""

    def __init__(self, data):
        self.data, self.position = data, 8
        self.code, self.range = int.from_bytes(data[:8].ljust(8, b"\0"), "big"), TOP

    def decode(self, cdfs):
        """The next symbols, one from each table in cdfs, lists [0, ..., TOTAL]: indices into
        them."""
        code, range_, data, position = self.code, self.range, self.data, self.position
        end, indices = len(data), []
        for cdf in cdfs:
            unit = range_ >> PRECISION
            index = bisect_right(cdf, code // unit) - 1    # the entry whose interval holds the code
            if index == len(cdf) - 1:
                raise ValueError("the range-coded data is damaged")
            code -= unit * cdf[index]
            range_ = unit * (cdf[index + 1] - cdf[index])
            while range_ < BOTTOM:
                code = (code << 8) | (data[position] if position < end else 0)
                position += 1
                range_ <<= 8
            indices.append(index)
        if position > end + 8:                              # no more than 8 zeros were left out
            raise ValueError("the range-coded data ends too early")
        self.code, self.range, self.position = code, range_, position
        return indices


BYTE = list(range(0, TOTAL + 1, TOTAL // 256))              # 256 equally likely values


def encode(k, tables, q):
    """(bytes, ideal bits) of an integer latent k (M, h, w), |k| < 2^29, at quality level q. The
    bytes come within 0.2 % and a few bytes of the bits, which are the cross-entropy."""
    coder = RangeEncoder()

    def write(which, values):
        """Code values (n,) with the tables `which` (n,). What escapes among them follows in full:
        it is too rare for its four bytes to count."""
        index, escape = values - tables.low[which], tables.size[which] - 1          # (n,) each
        outside = (index < 0) | (index >= escape)
        entry = tables.start[which] + np.where(outside, escape, index)
        start = tables.cdf[entry]
        coder.encode(start.tolist(), (tables.cdf[entry + 1] - start).tolist())
        for value in values[outside].tolist():
            four = value.to_bytes(4, "big", signed=True)
            coder.encode([BYTE[byte] for byte in four], [BYTE[1]] * 4)
        return values

    tables.walk(np.array(k, np.int64), q, write)
    return coder.finish(), coder.bits


def decode(data, tables, q, shape):
    """The inverse of `encode`: bytes to an int64 array of shape (M, h, w). ValueError on damage."""
    coder = RangeDecoder(data)

    @functools.cache
    def cdf(number):
        """Cumulative counts of a table, as a list: bisect is fastest with them."""
        start = tables.start[number]
        return tables.cdf[start:start + tables.size[number] + 1].tolist()

    def read(which, _):
        """The next values (n,), from the tables `which` (n,)."""
        index = np.array(coder.decode([cdf(number) for number in which.tolist()]), np.int64)
        values = index + tables.low[which]
        for i in np.flatnonzero(index == tables.size[which] - 1):
            values[i] = int.from_bytes(bytes(coder.decode([BYTE] * 4)), "big", signed=True)
        return values

    k = np.zeros(shape, np.int64)
    tables.walk(k, q, read)
    return k


# Part II. Beyond the minimum: what a symbol says about those that follow ==========================
# 4. The context model
#
# First, it says how large they will be: there is grass here, or sky. The width grows with a
# weighted sum of the sizes around, a size being |k| in units of the width that its channel usually
# has:
#
#     width *= 2^by_pass (1 + across . sizes of the channels before this one, in the same cell
#                           + window . their means over 3x3 cells (beyond the border all is zero)
#                           + near * the mean size of four neighbours in its own channel)
#
# with learned weights, none of them negative. (Buccigrossi & Simoncelli 1999 found that wavelet
# coefficients obey such a law.) Sizes are relative, so the same weights serve all quality levels.
#
# Second, where they will be: mu is `shift` times the mean of the four neighbours. That matters for
# few channels, but for these it matters much: neighbouring blocks differ little in their mean
# colour, which is why even JPEG codes only the differences. ELIC (He et al. 2022), the paper's
# autoencoder, has networks for both.
#
# Neighbours on all four sides can only be known if cells are not coded row by row. So each channel
# is coded from coarse to fine: first one cell in eight in each direction. Then the middle of every
# square of these, between its four corners; then the middle of every side, between four again. Now
# one in four is known, and so on until all are. Half of all cells come last, with four known.

REACH = 8                                       # cells between those that come first
PASSES = 1 + 2 * (REACH.bit_length() - 1)


@functools.lru_cache(8)
def coarse_to_fine(h, w):
    """The order in which the cells of an (h, w) channel are coded: for each of PASSES (cells,
    around, share), NumPy arrays. cells: (n,) numbers of cells, counted row by row; around: (4, n)
    the four nearest that are known by then, or h * w for one beyond the border ((0, n) in the first
    pass); share: (n,) 12 / (how many there are), since 1, 2, 3 and 4 divide 12."""
    i, j = np.divmod(np.arange(h * w), w)                                           # (h*w,) each
    number = np.pad(np.arange(h * w).reshape(h, w), REACH, constant_values=h * w)
    passes, half = [((i % REACH == 0) & (j % REACH == 0), [])], REACH // 2
    while half:
        start_i, start_j = i % (2 * half) == 0, j % (2 * half) == 0
        middle_i, middle_j = i % (2 * half) == half, j % (2 * half) == half
        corners = (-half, -half), (-half, half), (half, -half), (half, half)
        sides = (-half, 0), (half, 0), (0, -half), (0, half)
        passes.append((middle_i & middle_j, corners))
        passes.append((middle_i & start_j | start_i & middle_j, sides))
        half //= 2
    result = []
    for chosen, offsets in passes:
        cells = np.flatnonzero(chosen)
        around = [number[REACH + i[cells] + di, REACH + j[cells] + dj] for di, dj in offsets]
        around = np.array(around, np.int64).reshape(len(offsets), len(cells))
        result.append((cells, around, 12 // np.maximum((around < h * w).sum(0), 1)))
    return result


@functools.lru_cache(8)
def coarse_to_fine_on(h, w, device):
    """The same for training, uploaded once: ([(around, share / 12)], the way back to rows)."""
    passes = coarse_to_fine(h, w)
    back = np.concatenate([cells for cells, _, _ in passes]).argsort()              # (h*w,)
    upload = functools.partial(torch.as_tensor, device=device)
    parts = [(upload(around), upload(share / 12, dtype=torch.float32))
             for _, around, share in passes]
    return parts, upload(back)


class ContextPrior(FactorizedPrior):
    """A factorized prior that is told where each symbol will lie, and how widely. P passes."""

    def __init__(self, channels, levels, components=3):
        super().__init__(channels, levels, components)
        # It starts without a mean, and with a little of every size.
        self.by_pass = nn.Parameter(torch.zeros(PASSES, channels))                  # (P, M) octaves
        self.shift = nn.Parameter(torch.zeros(PASSES, channels))                    # (P, M)
        self.near = nn.Parameter(torch.full((PASSES, channels), 0.25))              # (P, M)
        # (M, M) each, of which the part below the diagonal is used: the channels before.
        self.across = nn.Parameter(torch.full((channels, channels), 0.25 / channels))
        self.window = nn.Parameter(torch.full((channels, channels), 0.25 / channels))

    def where(self, k, step, q):
        """(mu, width) of each symbol of k (B, M, h, w), from those coded before it: (B, M, h,
        w)."""
        octaves = self.usual_octaves(step, q)                                       # (B, M, 1, 1)
        size = (k.abs() * torch.exp2(-octaves)).clamp_max(LARGEST)                  # (B, M, h, w)
        here = (self.across.abs().tril(-1) @ size.flatten(2)).view(k.shape)         # (B, M, h, w)
        about = (self.window.abs().tril(-1) @ size.flatten(2)).view(k.shape)        # (B, M, h, w)
        total = here + F.avg_pool2d(about, 3, stride=1, padding=1)                  # (B, M, h, w)
        values, sizes = (F.pad(of.flatten(2), (0, 1)) for of in (k, size))         # (B, M, h*w + 1)
        parts, back = coarse_to_fine_on(*k.shape[2:], k.device)
        found = []
        for n, (around, share) in enumerate(parts):
            mu = self.shift[n][:, None] * values[..., around].sum(2) * share        # (B, M, n)
            near = self.near[n].abs()[:, None] * sizes[..., around].sum(2) * share  # (B, M, n)
            found.append(torch.stack([mu, near, self.by_pass[n][:, None].expand_as(mu)]))
        mu, near, by_pass = torch.cat(found, 3)[..., back].view(3, *k.shape)     # (B, M, h, w) each
        return mu, torch.exp2(limited(octaves + by_pass + torch.log2(1 + total + near)))

    @torch.no_grad()
    def freeze(self, steps):
        """This prior as integer ContextTables, for quantization steps (Q, M)."""
        plain, prior = super().freeze(steps), copy.deepcopy(self).cpu().double()
        shifts = np.arange(-SHIFTS // 2, SHIFTS // 2) / SHIFTS
        sizes = prior.near.abs(), prior.across.abs().tril(-1), prior.window.abs().tril(-1)
        return ContextTables(*cumulative_counts(prior, shifts), plain.octaves,
                             whole(prior.by_pass, OCTAVE, np.int32),
                             whole(prior.shift, UNIT, np.int16),
                             *(whole(weights, WEIGHT, np.int16) for weights in sizes)).validate()


# 5. The same walk in exact integers ---------------------------------------------------------------

SHIFTS = 8                 # mu is rounded to eighths; what is left of it after whole symbols is one
WIDTH = 1 << 12             # a size of 1, a whole width, in integers
LARGEST = 1 << 12           # larger sizes count as this
WEIGHT = 1 << 12            # a size's weight of 1; they have 16 bits, so they are below 8
UNIT = 1 << 14              # a mean's weight of 1; they lie between -2 and 2

# Integers have logarithms, too: POWERS[i] is 2^((i - 1/2) / OCTAVE), rounded down. For the topmost
# octave these are 128th roots of powers of two, seven square roots one after the other; each octave
# below is half of it. So nothing here depends on a floating-point library.
_topmost = [functools.reduce(lambda x, _: math.isqrt(x), range(7), 1 << 128 * 61 + 2 * i - 1)
            for i in range(OCTAVE)]
POWERS = np.array([power >> 61 - octave for octave in range(62) for power in _topmost])


def octaves_of(n):
    """OCTAVE * log2 n, rounded, of an array of integers n from 1 to 2^61. (n is whole, so it is
    above a power exactly if it is above that power rounded down.)"""
    return np.searchsorted(POWERS, n) - 1


@dataclass
class ContextTables(Tables):
    """A frozen ContextPrior: SHIFTS tables per width, for mu beside a whole symbol, and weights."""
    by_pass: np.ndarray     # (P, M) int32, what each pass adds to the octaves, in 1 / OCTAVE
    shift: np.ndarray       # (P, M) int16, weight of the neighbours' mean, in 1 / UNIT
    near: np.ndarray        # (P, M) int16, weight of their mean size, in 1 / WEIGHT, not negative;
    across: np.ndarray      # (M, M) int16, likewise: weight of channel j's size for channel i > j
    window: np.ndarray      # (M, M) int16, likewise: of its mean over 3x3 cells

    SHIFTS = SHIFTS
    TYPES = (np.int32,) * 6 + (np.int16,) * 4

    def validate(self):
        """Return self, or raise ValueError unless coder and context model are safe to use."""
        super().validate()
        M = self.octaves.shape[1]
        if [a.shape for a in list(vars(self).values())[5:]] != [(PASSES, M)] * 3 + [(M, M)] * 2:
            raise ValueError("the context model has the wrong shape")
        # With these limits no sum leaves 64 bits. In each pass a symbol is at most twice its
        # neighbours' mean and 2^31 more, so below 2^39 after seven; its size, in 1 / WIDTH of the
        # narrowest width, is then below 2^57, its share of mu below 2^61, and a sum of 9 M sizes
        # (at most LARGEST each), weighted, below 2^57.
        if min(a.min() for a in (self.near, self.across, self.window)) < 0:
            raise ValueError("the context model weighs sizes with less than nothing")
        return self

    def walk(self, k, q, visit):
        """As Tables.walk: channel by channel, and within each from coarse to fine."""
        M, h, w = k.shape
        octaves, passes = self.octaves[q].astype(np.int64), coarse_to_fine(h, w)    # (M,)
        by_pass, shift, near = (a.astype(np.int64) for a in (self.by_pass, self.shift, self.near))
        one_in_widths = WIDTH * POWERS[20 * OCTAVE - octaves] >> 20                # (M,) 2^-octaves
        weights = np.stack([self.across, self.window], axis=1).astype(np.float64)   # (M, 2, M)
        turn = np.empty(h * w, np.int64)                    # in which pass a cell's turn comes
        for n, (cells, _, _) in enumerate(passes):
            turn[cells] = n
        one = WEIGHT * WIDTH                                # a size of 1 with a weight of 1
        # Sums of sizes are exact in float64, whatever the order: all are integers below
        # M * 2^15 * 2^24 < 2^53. And its matrix products are fast.
        heard, known = [], np.empty((M, h * w))             # channels that are not all zero; sizes
        for m in range(M):
            sums = weights[m][:, heard] @ known[:len(heard)]                        # (2, h*w)
            here, about = sums.astype(np.int64)
            about = np.pad(about.reshape(h, w), 1)                                  # (h+2, w+2)
            windows = np.lib.stride_tricks.sliding_window_view(about, (3, 3))       # (h, w, 3, 3)
            total = here + windows.sum((2, 3)).ravel() // 9                         # (h*w,)
            usual = octaves[m] + by_pass[turn, m]                                   # (h*w,)
            values = np.append(k[m], 0)                     # the last one stands for the border
            sizes = np.zeros_like(values)
            for n, (cells, around, share) in enumerate(passes):
                weighted = total[cells] + near[n, m] * sizes[around].sum(0) * share // 12   # (n,)
                wider = octaves_of(one + weighted) - octaves_of(one)                # (n,)
                mean = values[around].sum(0) * share * shift[n, m]                  # (n,)
                eighths = (mean * SHIFTS + 6 * UNIT) // (12 * UNIT)               # (n,) mu, rounded
                beside = (eighths + SHIFTS // 2) // SHIFTS                     # (n,) its whole part
                which = table_of(usual[cells] + wider) * SHIFTS + SHIFTS // 2
                which += eighths - SHIFTS * beside                                  # (n,)
                values[cells] = beside + visit(which, values[cells] - beside)
                size = np.abs(values[cells]) * one_in_widths[m]                     # (n,)
                sizes[cells] = np.minimum(size, WIDTH * LARGEST)
            k[m] = values[:-1].reshape(h, w)
            if k[m].any():
                known[len(heard)] = sizes[:-1]
                heard.append(m)


PRIORS = {"factorized": FactorizedPrior, "context": ContextPrior}
TABLES = {"factorized": Tables, "context": ContextTables}


# 6. A small map -----------------------------------------------------------------------------------
# HFD+ (hfd.residual_energy) has a map of levels, small and smooth. Each entry is coded given its
# left neighbour; at the left edge that is the one above, and for the very first the middle level.
# Probability halves with every unit of distance: no statistics to learn, no table to store.


def walk_map(values, levels, visit):
    """Go through a map, a list of rows: visit(table, value) codes each with a table [0, ..., TOTAL]
    and returns it, as Tables.walk has it."""
    above = levels // 2
    for row in values:
        neighbour = above
        for j, value in enumerate(row):
            weights = [1 << (levels - abs(level - neighbour)) for level in range(levels)]
            cdf = [TOTAL * sum(weights[:n]) // sum(weights) for n in range(levels + 1)]
            row[j] = neighbour = visit(cdf, value)
        above = row[0]
    return values


def encode_map(values, levels):
    """Code a small array (h, w) of integers 0 .. levels - 1. Returns bytes."""
    coder = RangeEncoder()

    def write(cdf, value):
        """Code one entry."""
        coder.encode([cdf[value]], [cdf[value + 1] - cdf[value]])
        return value

    walk_map(np.asarray(values).tolist(), levels, write)
    return coder.finish()


def decode_map(data, levels, shape):
    """The inverse of `encode_map`: bytes to an int64 array of shape (h, w). ValueError on
    damage."""
    coder = RangeDecoder(data)
    values = np.zeros(shape, np.int64).tolist()
    return np.array(walk_map(values, levels, lambda cdf, _: coder.decode([cdf])[0]))
