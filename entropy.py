"""Bits: from the probability of a latent to the bytes of a file, and back.

An image codec ends in a short lossless step. The latent y has been rounded to integers k, and they must
become as few bytes as possible. Four ideas do it, told here in this order; a fifth section codes a whole latent with them:

1. A *factorized prior* (Balle et al. 2018, appendix 6.1) gives every latent channel a learned distribution. The probability of an integer
   is what lies in its bin, however wide the steps are. "Factorized" means: no symbol looks at its neighbours.
2. A *context model* lets them look, after all, at what has been coded before: it moves and stretches the prior, symbol by symbol.
   (The paper's autoencoder is ELIC, He et al. 2022, with such a model; this is its idea in the smallest form.)
3. *Integer tables*. A decoder on another machine must reach exactly the same probabilities, and floating
   point does not promise that. So when training ends, prior and context model are frozen to integers once and for all.
4. A *range coder* (Martin 1979) turns symbols and integer tables into bytes, within a fraction of a
   per cent of the cross-entropy, which is what the bits in the training's loss estimate.

Decoding is exact integer arithmetic from the third idea on: a file means the same everywhere.
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

# 1. The prior -----------------------------------------------------------------------------------------


class Prior(nn.Module):
    """The probability of every symbol, given those before it.

    Without context it is factorized, one continuous CDF per latent channel: c_m(y) = c(y / width_m), where c is a mixture of three
    logistics around zero, whose weights and widths are learned once for all channels,

        c(y) = sum_i w_i * sigmoid(y / s_i),   sum_i w_i = 1,  s_i > 0.

    A mixture of CDFs is a CDF, so nothing has to be constrained (Balle et al. 2018 use a small monotone network
    instead: more flexible, several times slower, and slower to learn in our trials). Three logistics of different
    widths can draw what transform coefficients look like: a sharp peak at zero with heavy tails.

    The context (section 2) then says for each symbol around which value mu to expect it, and how many octaves (factors of two) wider or
    narrower than usual. In units of the quantization step, where symbols are integers:

        P(k) = c((k + 1/2 - mu) / width) - c((k - 1/2 - mu) / width),   width = 2^wider width_m / step.

    M channels, Q quality levels, P passes of section 2.
    """

    def __init__(self, channels, levels, components=3):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))                                     # (K,)
        self.log_widths = nn.Parameter(torch.logspace(math.log10(0.25), math.log10(2.5), components).log())     # (K,), narrow .. wide
        self.octaves = nn.Parameter(torch.zeros(channels))                                      # (M,) log2 of each channel's width
        self.by_level = nn.Parameter(torch.zeros(levels, channels))                             # (Q, M) and what is added at each level
        # The context model starts without a mean, and with a little of every size. Of near, across and window only absolute values are used.
        self.by_pass, self.shift = (nn.Parameter(torch.zeros(PASSES, channels)) for _ in range(2))      # (P, M) each
        self.near = nn.Parameter(torch.full((PASSES, channels), 0.25))                          # (P, M)
        self.across, self.window = (nn.Parameter(torch.full((channels, channels), 0.25 / channels)) for _ in range(2))  # (M, M), used below the diagonal

    @torch.no_grad()
    def fit_scale(self, y):
        """Start every channel at its own size: width_m = mean |y_m| over a first batch y of shape (B, M, H, W).

        Channels differ a hundredfold (the mean colour of a block against its finest ripple). Without this the
        first thousand steps only teach the prior how large the numbers are."""
        self.octaves.copy_(y.abs().mean(dim=(0, 2, 3)).clamp_min(1e-3).log2())

    def likelihood(self, u, width):
        """P(symbol falls in [u - 1/2, u + 1/2]) under c at this width, around zero. u: any shape; width > 0: anything that broadcasts
        against u. Returns u's shape, values in [0, 1]."""
        p = 0.0
        for w, s in zip(self.logits.softmax(0), self.log_widths.exp()):                         # scalars
            upper, lower = (u + 0.5) / (s * width), (u - 0.5) / (s * width)
            # Far to the right both sigmoids are 1 - tiny, and their difference is rounding noise. By symmetry,
            # sigmoid(a) - sigmoid(b) = sigmoid(-b) - sigmoid(-a), so compute on the side where both are small.
            flip = torch.where(upper + lower > 0, -1.0, 1.0)
            p = p + w * (flip * (torch.sigmoid(flip * upper) - torch.sigmoid(flip * lower)))
        return p

    def bits(self, u, k, step, q):
        """-log2 likelihood, element by element: the bits an ideal coder would spend.

        u: (B, M, h, w), the values to code, in units of steps; k: (B, M, h, w), those that the context is taken from (in training the one is
        noisy and the other rounded, see hfd.Autoencoder.forward); step: (B, M, 1, 1); q: (B,) levels. Returns (B, M, h, w).
        The floor of 2^-30 stands for the escape code, which makes no symbol infinitely expensive."""
        # No width is narrower or wider than the tables that there will be. But beyond these limits 1 % of the gradient passes, so that a
        # parameter that strayed there can come back.
        limited = lambda octaves: octaves.clamp(*LIMITS) + 0.01 * (octaves - octaves.detach())
        octaves = limited((self.octaves + self.by_level[q])[:, :, None, None] - torch.log2(step))   # (B, M, 1, 1) without context
        mu, wider = self.context(k, octaves)                                                    # (B, M, h, w) each
        return -torch.log2(self.likelihood(u - mu, torch.exp2(limited(octaves + wider))) + 2.0 ** -30)

    def context(self, k, octaves):
        """(mu, how many octaves wider) for each symbol of k (B, M, h, w), from those coded before it: (B, M, h, w) each. See section 2.
        octaves: (B, M, 1, 1), log2 of the widths without context, in symbols."""
        size = (k.abs() * torch.exp2(-octaves)).clamp_max(LARGEST)                              # (B, M, h, w)
        before = lambda weights: (weights.abs().tril(-1) @ size.flatten(2)).view(k.shape)       # (B, M, h, w), over the channels before
        total = before(self.across) + F.avg_pool2d(before(self.window), 3, stride=1, padding=1)
        values, sizes = (F.pad(of.flatten(2), (0, 1)) for of in (k, size))                      # (B, M, h*w + 1) each
        found, parts = [], coarse_to_fine(*k.shape[2:])
        for n, (_, around, share) in enumerate(parts):
            share = torch.from_numpy(share).to(k) / 12                                          # (n,)
            mu = self.shift[n][:, None] * values[..., around].sum(2) * share                    # (B, M, n)
            near = self.near[n].abs()[:, None] * sizes[..., around].sum(2) * share              # (B, M, n)
            found.append(torch.stack([mu, near, self.by_pass[n][:, None].expand_as(mu)]))       # (3, B, M, n)
        back = np.concatenate([cells for cells, _, _ in parts]).argsort()                       # (h*w,) from the passes' order to rows
        mu, near, by_pass = torch.cat(found, 3)[..., back].view(3, *k.shape)                    # (B, M, h, w) each
        return mu, by_pass + torch.log2(1 + total + near)


# 2. The context ---------------------------------------------------------------------------------------
# What does a symbol say about the ones that follow? First, how large they will be: there is grass here, or sky. The width grows with a
# weighted sum of the sizes around it, a size being |k| in units of the width that its channel has without context:
#
#     width *= 1 + across . sizes of the channels before this one, in the same cell (a column of the latent, 16x16 pixels)
#                + window . their means over 3x3 cells (a ninth of the sum; beyond the border all is zero)
#                + near * the mean size of four neighbours in its own channel
#
# with learned weights, none of them negative. (Buccigrossi & Simoncelli 1999 found that wavelet coefficients obey such a law.) As sizes are
# relative, the same weights serve all quality levels; `by_pass` widens the early passes, which know less (below).
#
# Second, where they will be: mu is `shift` times the mean of these four neighbours. This matters for few channels, but for these it matters
# much: neighbouring blocks differ little in their mean colour, which is why even JPEG codes only the differences.
#
# ELIC has a network for each of these, with the same two kinds of context (channels in turn, and a chequerboard of cells).
#
# Neighbours on all four sides can only be known if cells are not coded row by row. So each channel is coded from coarse to fine: first one
# cell in eight in each direction. Then the middle of every square of these, between its four corners; then the middle of every side, between
# four again. Now one in four in each direction is known, and so on until all are. Half of all cells come last, with all four next to them.

REACH = 8                                       # cells between those that come first
PASSES = 1 + 2 * (REACH.bit_length() - 1)


@functools.lru_cache(4)
def coarse_to_fine(h, w):
    """The order in which the cells of an (h, w) channel are coded: for each of PASSES (cells, around, share), NumPy arrays.

    cells: (n,) numbers of cells, counted row by row. around: (4, n) the four nearest that are known by then, or h * w for one beyond the
    border ((0, n) in the first pass). share: (n,), 12 / (how many there are), for a mean in whole twelfths: 1, 2, 3 and 4 divide 12."""
    i, j = np.divmod(np.arange(h * w), w)                                                       # (h*w,)
    number = np.pad(np.arange(h * w).reshape(h, w), REACH, constant_values=h * w)
    passes = [((i % REACH == 0) & (j % REACH == 0), [])]
    for half in (REACH >> n for n in range(1, REACH.bit_length())):                             # 4, 2, 1
        middle, start = [(at % (2 * half) == half) for at in (i, j)], [(at % (2 * half) == 0) for at in (i, j)]
        passes.append((middle[0] & middle[1], [(-half, -half), (-half, half), (half, -half), (half, half)]))
        passes.append((middle[0] & start[1] | start[0] & middle[1], [(-half, 0), (half, 0), (0, -half), (0, half)]))
    result = []
    for chosen, offsets in passes:
        cells = np.flatnonzero(chosen)
        around = [number[REACH + i[cells] + down, REACH + j[cells] + right] for down, right in offsets]
        around = np.array(around, np.int64).reshape(len(offsets), len(cells))
        result.append((cells, around, 12 // np.maximum((around < h * w).sum(0), 1)))
    return result


# 3. Integer tables ------------------------------------------------------------------------------------
# The prior's shape is one for all channels and levels. So one family of tables serves every symbol: WIDTHS widths, four to an octave, times
# SHIFTS fractions of a symbol by which mu can lie beside a whole one. The context chooses, in integers.

# Every entry needs a count of at least 1, taken from the others. Out of 2^16 and with an entry for every symbol that would cost several per
# cent of the bits at low rates, where most channels are nearly always zero. So only likely symbols have an entry; the others share an escape.
PRECISION = 24              # probabilities are integers out of 2^24
TOTAL = 1 << PRECISION
MAX_SYMBOL = 1023           # larger ones always escape
WIDTHS, FINEST = 49, -24    # table 0 has the width 2^(FINEST / 4), the last one 2^((FINEST + WIDTHS - 1) / 4)
LIMITS = FINEST / 4, (FINEST + WIDTHS - 1) / 4  # the same in octaves
SHIFTS = 8                  # mu is rounded to eighths
OCTAVE = 64                 # what an octave is in integers
WIDTH = 1 << 12             # what a size of 1, a whole width, is
LARGEST = 1 << 12           # larger sizes count as this
WEIGHT = 1 << 12            # what a size's weight of 1 is; they have 16 bits, so they are below 8
UNIT = 1 << 14              # what a mean's weight of 1 is; they lie between -2 and 2

# Integers have logarithms, too: POWERS[i] is 2^((i - 1/2) / OCTAVE), rounded down. For the topmost octave these are 128th roots of powers of
# two, seven square roots one after the other; each octave below is half of it. So nothing here depends on a floating-point library.
_topmost = [functools.reduce(lambda x, _: math.isqrt(x), range(7), 1 << 128 * 61 + 2 * i - 1) for i in range(OCTAVE)]
POWERS = np.array([power >> 61 - octave for octave in range(62) for power in _topmost])


def octaves_of(n):
    """OCTAVE * log2 n, rounded, of an array of integers n from 1 to 2^61. (n is whole, so it is above a power exactly if it is above that
    power rounded down.)"""
    return np.searchsorted(POWERS, n) - 1


@dataclass
class Tables:
    """Prior and context model, frozen. T = WIDTHS * SHIFTS tables of integer cumulative counts.

    Table t covers the symbols low[t] .. low[t] + size[t] - 2 and, last, an escape for all others. Its size + 1 cumulative
    counts are cdf[start[t] : start[t] + size[t] + 1]: 0, ..., 2^24. The rest is `Prior`'s, in integers.
    """
    low: torch.Tensor       # (T,) int32, the smallest symbol; never above 0
    size: torch.Tensor      # (T,) int32, number of entries, the escape included
    start: torch.Tensor     # (T,) int32, where the table begins in cdf
    cdf: torch.Tensor       # (sum of sizes + 1 each,) int32
    octaves: torch.Tensor   # (Q, M) int32, log2 of the width in symbols, without context, within LIMITS, in 1 / OCTAVE
    by_pass: torch.Tensor   # (P, M) int32, what each pass adds to the octaves, in 1 / OCTAVE
    shift: torch.Tensor     # (P, M) int16, weight of the neighbours' mean, in 1 / UNIT
    near: torch.Tensor      # (P, M) int16, weight of their mean size, in 1 / WEIGHT, not negative; so are the next two
    across: torch.Tensor    # (M, M) int16, weight of channel j's size for channel i > j
    window: torch.Tensor    # (M, M) int16, the same of its mean over 3x3 cells

    def validate(self):
        """Raise ValueError unless the coder can use the tables and the context model safely."""
        if [t.dtype for t in vars(self).values()] != [torch.int32] * 6 + [torch.int16] * 4:
            raise ValueError("tables or context model are not made of integers of the right size")
        low, size, start, cdf = (t.numpy().astype(np.int64) for t in (self.low, self.size, self.start, self.cdf))
        if not (low.shape == size.shape == start.shape == (WIDTHS * SHIFTS,) and cdf.ndim == 1):
            raise ValueError("probability tables have the wrong shape")
        high = low + size - 2                               # the largest symbol that has an entry
        if ((size < 2) | (low > 0) | (high < 0) | (low < -MAX_SYMBOL) | (high > MAX_SYMBOL)).any():
            raise ValueError("a probability table does not hold the symbol 0 and the escape, or too much")
        ends = start + size + 1
        if start[0] != 0 or (start[1:] != ends[:-1]).any() or ends[-1] != len(cdf):
            raise ValueError("probability tables do not lie side by side")
        if (cdf[start] != 0).any() or (cdf[start + size] != TOTAL).any():
            raise ValueError(f"a probability table does not run from 0 to {TOTAL}")
        if (np.delete(np.diff(cdf), start[1:] - 1) <= 0).any():     # from one table's end to the next one's start is no step
            raise ValueError("a probability table is not strictly increasing, so some symbol has no code")
        Q, M = self.octaves.shape if self.octaves.ndim == 2 else (0, 0)
        if not 0 < Q * M < 1 << 14 or [t.shape for t in list(vars(self).values())[5:]] != [(PASSES, M)] * 3 + [(M, M)] * 2:
            raise ValueError("the context model has the wrong shape")
        # With these limits no sum leaves 64 bits. In each pass a symbol is at most twice its neighbours' mean and 2^31 more, so below 2^39
        # after seven; its size, in 1 / WIDTH of the narrowest width, is then below 2^57, its share of mu below 2^61, and a sum of 9 M sizes
        # (at most LARGEST each), weighted, below 2^57.
        if min(t.min() for t in (self.near, self.across, self.window)) < 0:
            raise ValueError("the context model weighs sizes with less than nothing")
        if self.octaves.min() < OCTAVE * LIMITS[0] or self.octaves.max() > OCTAVE * LIMITS[1]:
            raise ValueError("the context model starts from widths that there are no tables for")
        return self


@torch.no_grad()
def freeze(prior, steps):
    """Turn a Prior and the quantization steps, shape (Q, M), into integer Tables.

    Every symbol with a probability of at least 2^-22 gets an entry of its own (up to +-1023), the rest shares the escape.
    """
    k = torch.arange(-MAX_SYMBOL, MAX_SYMBOL + 1, dtype=torch.float64)                          # (K,)
    prior = copy.deepcopy(prior).cpu().double()
    low, size, cdf = [], [], []
    for width in range(FINEST, FINEST + WIDTHS):
        for shift in range(-SHIFTS // 2, SHIFTS // 2):
            row = prior.likelihood(k - shift / SHIFTS, 2.0 ** (width / 4)).numpy()              # (K,)
            common = np.append(np.flatnonzero(row >= 2.0 ** (2 - PRECISION)), MAX_SYMBOL)       # k = 0 in any case
            first, last = common.min(), common.max()
            row = row[first:last + 1]
            row = np.append(row, max(1.0 - row.sum(), 0.0))                                     # the escape, last
            # Give each entry one count for being possible at all, share out the rest by probability, and let the
            # most likely entry take what rounding down left over: it notices least.
            counts = 1 + np.floor(row / row.sum() * (TOTAL - len(row))).astype(np.int64)
            counts[counts.argmax()] += TOTAL - counts.sum()
            low.append(first - MAX_SYMBOL)
            size.append(len(counts))
            cdf.append(np.concatenate([[0], counts.cumsum()]))
    start = np.cumsum([0] + [len(c) for c in cdf[:-1]])
    whole = lambda values, unit, dtype: (values * unit).round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)
    octaves = (prior.octaves + prior.by_level - steps.detach().cpu().double().log2()).clamp(*LIMITS)    # (Q, M)
    low, size, start, cdf = (torch.tensor(np.array(a), dtype=torch.int32) for a in (low, size, start, np.concatenate(cdf)))
    near, across, window = (whole(w.abs(), WEIGHT, torch.int16) for w in (prior.near, prior.across.tril(-1), prior.window.tril(-1)))
    return Tables(low=low, size=size, start=start, cdf=cdf, octaves=whole(octaves, OCTAVE, torch.int32),
                  by_pass=whole(prior.by_pass, OCTAVE, torch.int32), shift=whole(prior.shift, UNIT, torch.int16),
                  near=near, across=across, window=window).validate()


# 4. The range coder -----------------------------------------------------------------------------------
# The message so far is an interval [low, low + range) of the unit interval, written as integers. Coding a
# symbol that owns the counts [start, start + freq) of TOTAL keeps that share of the interval, so a symbol
# of probability p shrinks it by p and costs -log2 p bits. Any number inside the last interval names the message.
#
# The interval would need ever more digits; but its leading bytes settle one after the other and can be
# sent away. What stays in hand obeys these invariants before every symbol:
#
#   2^56 <= range <= 2^64        at least 56 bits, so range // TOTAL has 32: dividing wastes < 2^-32 of it
#   low  <  2^65                 64 bits plus at most one carry into the bytes already sent
#
# The carry: adding to `low` may overflow 2^64. Then one is added to the bytes already sent, as in school: every
# trailing 255 turns to 0, and the byte before goes up by one. There always is such a byte, because
# low + range never grows past the end of the interval it started in.

TOP, BOTTOM = 1 << 64, 1 << 56


class RangeEncoder:
    """Collects symbols given as integer intervals (start, freq) of TOTAL; `finish` returns the bytes. `bits`: what an ideal coder would
    need for them, -log2 of each probability, added up."""

    def __init__(self):
        self.low, self.range, self.out, self.bits = 0, TOP, bytearray(), 0.0

    def encode(self, starts, freqs):
        """Code a sequence of symbols: symbol i owns the counts [starts[i], starts[i] + freqs[i]). Lists of int."""
        low, range_, out = self.low, self.range, self.out       # local names: this loop is the codec's hot spot
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

    def encode_bits(self, value, count):
        """Code the `count` low bits of value, highest first, at one bit each."""
        half = TOTAL // 2
        self.encode([half * ((value >> i) & 1) for i in reversed(range(count))], [half] * count)

    def _carry(self):
        i = len(self.out) - 1
        while self.out[i] == 255:
            self.out[i] = 0
            i -= 1
        self.out[i] += 1

    def finish(self):
        """The bytes of the message, as few as name it: the decoder reads up to 8 zeros past the end, so the last number's
        trailing zeros are not stored, and of all numbers in the interval we take the one that ends in the most zeros."""
        for kept in range(0, 72, 8):
            unit = 1 << (64 - kept)
            value = -(-self.low // unit) * unit                 # the first multiple of unit that is >= low
            if value < self.low + self.range:
                break
        if value >= TOP:
            self._carry()
            value -= TOP
        return bytes(self.out) + value.to_bytes(8, "big").rstrip(b"\0")


class RangeDecoder:
    """Mirrors RangeEncoder step by step. It keeps code = (message - low) instead of low itself, so no carry occurs.

    Invariant: 0 <= code < range for bytes that an encoder wrote; other bytes raise ValueError or decode to some symbols.
    """

    def __init__(self, data):
        self.data, self.position = data, 8
        self.code, self.range = int.from_bytes(data[:8].ljust(8, b"\0"), "big"), TOP

    def decode(self, cdfs):
        """The next symbols, one from each of the tables cdfs, lists [0, ..., TOTAL]. Returns indices into them."""
        code, range_, data, position, end = self.code, self.range, self.data, self.position, len(self.data)
        indices = []
        for cdf in cdfs:
            unit = range_ >> PRECISION
            index = bisect_right(cdf, code // unit) - 1         # the entry whose interval holds the code
            if index == len(cdf) - 1:
                raise ValueError("the range-coded data is damaged")
            start = cdf[index]
            code -= unit * start
            range_ = unit * (cdf[index + 1] - start)
            while range_ < BOTTOM:
                code = (code << 8) | (data[position] if position < end else 0)
                position += 1
                range_ <<= 8
            indices.append(index)
        if position > end + 8:                                  # of a whole message at most 8 zeros were not stored
            raise ValueError("the range-coded data ends too early")
        self.code, self.range, self.position = code, range_, position
        return indices

    def decode_bits(self, count):
        """The integer that `encode_bits` was given."""
        value = 0
        for bit in self.decode([[0, TOTAL // 2, TOTAL]] * count):
            value = (value << 1) | bit
        return value


# Elias-gamma (Elias 1975): n >= 1 with b + 1 binary digits is sent as b zeros followed by those digits. It
# needs no table and no upper bound, and small n are cheap: right for values too rare to have a count of their own.

def encode_gamma(coder, n):
    """Code the integer n >= 1 with a RangeEncoder, in 2 floor(log2 n) + 1 bits."""
    coder.encode_bits(n, 2 * n.bit_length() - 1)                # the leading zeros are those of a wider field


def decode_gamma(coder):
    """The integer that `encode_gamma` was given, from a RangeDecoder. ValueError if it would reach 2^31."""
    digits = 1
    while not coder.decode_bits(1):
        digits += 1
        if digits > 31:                                         # no real latent is that large: 2^31 steps
            raise ValueError("the range-coded data is damaged")
    return (1 << (digits - 1)) | coder.decode_bits(digits - 1)


# 5. Small maps and whole latents ----------------------------------------------------------------------
# HFD+ (hfd.residual_energy) has a map of levels, small and smooth. Each entry is coded given its left neighbour; at the left edge that
# is the one above, and for the very first the middle level. Probability halves with every unit of distance: no statistics to
# learn, no table to store.


def _map_tables(levels):
    """The cumulative tables of a map's entry, one for each value of its neighbour: lists [0, ..., TOTAL]."""
    tables = []
    for value in range(levels):
        weights = [1 << (levels - abs(level - value)) for level in range(levels)]
        tables.append([TOTAL * sum(weights[:n]) // sum(weights) for n in range(levels + 1)])
    return tables


def encode_map(values, levels):
    """Code a small array (h, w) of integers 0 .. levels - 1. Returns bytes."""
    coder, tables, above = RangeEncoder(), _map_tables(levels), levels // 2
    for row in np.asarray(values).tolist():
        for neighbour, value in zip([above] + row, row):
            cdf = tables[neighbour]
            coder.encode([cdf[value]], [cdf[value + 1] - cdf[value]])
        above = row[0]
    return coder.finish()


def decode_map(data, levels, shape):
    """The inverse of `encode_map`: bytes to an int64 array of the given shape (h, w). Raises ValueError on damage."""
    coder, tables, values, above = RangeDecoder(data), _map_tables(levels), [], levels // 2
    for _ in range(shape[0]):
        row = [above]
        for _ in range(shape[1]):
            row += coder.decode([tables[row[-1]]])
        values.append(row[1:])
        above = values[-1][0]
    return np.array(values, np.int64)


FLAG_FROM = 4       # a channel of fewer symbols has no flag: there its cost would be noticed


def _zero_flag(zeros, t):
    """The cumulative table [0, not all zero, all zero] for a channel whose symbols, were they all zero, would be coded with the tables t,
    (h*w,). zeros: of each table, the count of the symbol 0.

    The product of P(0) over all symbols is what the prior gives to all of them being zero. A flag of that probability costs
    an all-zero channel just what its zeros would have cost, and spares the loop over them. (But never more than 24 bits: in a
    large and smooth picture whole channels are silent, more often than independent symbols would be.) Saying "not all zero" costs
    -log2(1 - P) bits more than needed, on average 0.53 bit at worst: hence FLAG_FROM. Powers by repeated squaring in integers
    of 62 bits, for floating-point powers differ between machines."""
    power = 1 << 62
    for table, count in enumerate(np.bincount(t).tolist()):
        base = zeros[table] << (62 - PRECISION)
        while count:
            if count & 1:
                power = (power * base) >> 62
            base = (base * base) >> 62
            count >>= 1
    return [0, TOTAL - min(max(power >> (62 - PRECISION), 1), TOTAL - 1), TOTAL]


def _table_of(octaves, eighths=0):
    """The number of the table for a width of 2^(octaves / OCTAVE), an array, and mu = eighths / 8 from -4/8 to 3/8."""
    quarters = (octaves + OCTAVE // 8) // (OCTAVE // 4)                                         # rounded
    return np.clip(quarters - FINEST, 0, WIDTHS - 1) * SHIFTS + SHIFTS // 2 + eighths


def _walk(k, shape, tables, q, silent, symbols):
    """Go through a latent in the order in which it is coded, and ask for each symbol that stands there.

    k: int64 (M, h * w), where shape = (h, w). silent(flag, channel): whether a channel is zero throughout; `flag` is the table for that.
    symbols(t, rest): what is coded with the tables t, an array (n,): values less the whole part of mu, (n,). An encoder is handed it and
    hands it back, a decoder returns what it reads, and k is filled with that. So both walk the same way and see the same context."""
    octaves, by_pass, shift, near = (t.numpy().astype(np.int64) for t in (tables.octaves[q], tables.by_pass, tables.shift, tables.near))
    size_of_one = WIDTH * POWERS[20 * OCTAVE - octaves] >> 20   # (M,) 2^-octaves: a symbol of 1 in widths without context, in 1 / WIDTH
    weights, passes = torch.stack([tables.across, tables.window], 1).numpy().astype(np.float64), coarse_to_fine(*shape)     # (M, 2, M)
    turn = np.empty(k.shape[1], np.int64)                   # in which pass a cell's turn comes
    for n, (cells, _, _) in enumerate(passes):
        turn[cells] = n
    at_zero = (tables.start - tables.low).long()            # where in cdf the symbol 0 begins
    zeros = (tables.cdf[at_zero + 1] - tables.cdf[at_zero]).tolist()
    one = WEIGHT * WIDTH                                    # a size of 1 with a weight of 1

    sizes = lambda values, m: np.minimum(np.abs(values) * size_of_one[m], WIDTH * LARGEST)  # of channel m, in 1 / WIDTH of its usual width
    wider = lambda total: octaves_of(one + total) - octaves_of(one)                         # what a weighted sum adds, in 1 / OCTAVE

    # Exact in float64, whatever the order: these are integers, and all sums lie below M * 2^15 * 2^24 < 2^53. And its matrix products are fast.
    heard, known = [], np.empty(k.shape)                    # channels that are not silent, and their sizes (.., h*w)
    for m, channel in enumerate(k):                                                             # (h*w,)
        here, about = (weights[m][:, heard] @ known[:len(heard)]).astype(np.int64)              # (h*w,) each
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(about.reshape(shape), 1), (3, 3))     # (h, w, 3, 3)
        total = here + windows.sum((2, 3)).ravel() // 9                                         # (h*w,)
        usual = octaves[m] + by_pass[turn, m]                                                   # (h*w,)
        # Were all of them zero, then so were mu and what is near, and these are the tables that they would be coded with.
        if len(channel) >= FLAG_FROM and silent(_zero_flag(zeros, _table_of(usual + wider(total))), channel):
            continue
        values = np.append(channel, 0)                      # the last one stands for neighbours beyond the border
        for n, (cells, around, share) in enumerate(passes):
            others = values[around]                                                             # (4, n)
            sum_of_sizes = total[cells] + near[n, m] * sizes(others, m).sum(0) * share // 12    # (n,)
            eighths = (others.sum(0) * share * shift[n, m] * SHIFTS + 6 * UNIT) // (12 * UNIT)  # (n,) mu in eighths, rounded
            whole = (eighths + SHIFTS // 2) // SHIFTS                                           # (n,)
            t = _table_of(usual[cells] + wider(sum_of_sizes), eighths - SHIFTS * whole)         # (n,)
            values[cells] = whole + symbols(t, values[cells] - whole)
        channel[:] = values[:-1]
        known[len(heard)] = sizes(channel, m)
        heard.append(m)


def coded(k, tables, q):
    """A RangeEncoder that was given all of an integer latent k, an array (M, h, w), at quality level q. Its `finish` has the bytes; they come
    within 0.2 % and a few bytes of its `bits`."""
    coder = RangeEncoder()
    low, size, start, cdf = (t.numpy().astype(np.int64) for t in (tables.low, tables.size, tables.start, tables.cdf))

    def silent(flag, channel):
        """Say whether a channel is zero throughout."""
        answer = not channel.any()
        coder.encode([flag[answer]], [flag[answer + 1] - flag[answer]])
        return answer

    def symbols(t, values):
        """Code values with the tables t; what escapes among them follows."""
        escape, index = size[t] - 1, values - low[t]                                            # (n,) each
        outside = (index < 0) | (index >= escape)
        entry = start[t] + np.where(outside, escape, index)                                     # (n,)
        coder.encode(cdf[entry].tolist(), (cdf[entry + 1] - cdf[entry]).tolist())
        for value, first, beyond in zip(*(a[outside].tolist() for a in (values, low[t], low[t] + escape))):
            above = value >= beyond
            coder.encode_bits(above, 1)
            encode_gamma(coder, value - beyond + 1 if above else first - value)
        return values

    _walk(np.array(k, np.int64).reshape(len(k), -1), k.shape[1:], tables, q, silent, symbols)
    return coder


def encode(k, tables, q):
    """The bytes of an integer latent k, an array of shape (M, h, w), at quality level q."""
    return coded(k, tables, q).finish()


def decode(data, tables, q, shape):
    """The inverse of `encode`: bytes to an int64 array of the given shape (M, h, w). Raises ValueError on damage."""
    coder = RangeDecoder(data)
    low, size, start = (t.numpy().astype(np.int64) for t in (tables.low, tables.size, tables.start))
    cdf = functools.cache(lambda t: tables.cdf[start[t]:start[t] + size[t] + 1].tolist())   # as lists: bisect is fastest with them

    def symbols(t, _):
        """The next values, from the tables t."""
        index = np.array(coder.decode([cdf(i) for i in t.tolist()]), np.int64)
        values = index + low[t]
        for i in np.flatnonzero(index == size[t] - 1):
            above, distance = coder.decode_bits(1), decode_gamma(coder)
            values[i] = values[i] + distance - 1 if above else low[t[i]] - distance
        return values

    k = np.zeros((shape[0], shape[1] * shape[2]), np.int64)
    _walk(k, shape[1:], tables, q, lambda flag, _: coder.decode([flag])[0], symbols)
    return k.reshape(shape)
