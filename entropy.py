"""Bits: from the probability of a latent to the bytes of a file, and back.

An image codec ends in a short lossless step. The latent y has been rounded to integers k, and they must
become as few bytes as possible. Four ideas do it, told here in this order; a fifth section codes a whole latent with them:

1. A *factorized prior* (Balle et al. 2018, appendix 6.1) learns, for every latent channel m, a cumulative
   distribution function c_m(y). Rounding with a step puts all of [k - 1/2, k + 1/2] * step into symbol k, so
   P(k) = c_m((k + 1/2) step) - c_m((k - 1/2) step), whatever the step is. "Factorized" means: no symbol
   looks at its neighbours.
2. *Integer tables*. A decoder on another machine must reach exactly the same probabilities, and floating
   point does not promise that. So when training ends, the prior is frozen to integers once and for all.
3. A *range coder* (Martin 1979) turns symbols and integer tables into bytes, within a fraction of a
   per cent of the cross-entropy, for which the bits in the training's loss stood.
4. *Scales*. One distribution per channel, for sky and grass alike, is wrong nearly everywhere by a factor. So each cell
   of the latent says by which factor to stretch them all: a scale hyperprior (Balle et al. 2018) in its smallest form.

Decoding is exact integer arithmetic from step 2 on: a file means the same everywhere.
"""
import copy
import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

# ------------------------------------------------------------------------------------------------------
# 1. The factorized prior
# ------------------------------------------------------------------------------------------------------


class FactorizedPrior(nn.Module):
    """One learned, continuous, monotone CDF per latent channel: a mixture of three logistics.

    c_m(y) = sum_i w_mi * sigmoid((y / scale_m - mu_mi) / s_mi),   sum_i w_mi = 1,  s_mi > 0

    A mixture of CDFs is a CDF, so nothing has to be constrained (Balle et al. 2018 use a small monotone network
    instead: more flexible, several times slower, and slower to learn in our trials). Three logistics of different
    widths can draw what transform coefficients look like: a sharp peak at zero with heavy tails.

    Parameters are per channel, M = channels. `y` may be any real number; units are those of the latent.
    """

    def __init__(self, channels, components=3):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))                                    # (M,)
        self.logits = nn.Parameter(torch.zeros(components, channels))                           # (K, M)
        self.means = nn.Parameter(torch.zeros(components, channels))                            # (K, M)
        widths = torch.logspace(math.log10(0.25), math.log10(2.5), components)                  # narrow .. wide
        self.log_widths = nn.Parameter(widths.log()[:, None].repeat(1, channels))               # (K, M)

    @torch.no_grad()
    def fit_scale(self, y):
        """Start every channel at its own size: scale_m = mean |y_m| over a first batch y of shape (B, M, H, W).

        Channels differ a hundredfold (the mean colour of a block against its finest ripple). Without this the
        first thousand steps only teach the prior how large the numbers are."""
        self.log_scale.copy_(y.abs().mean(dim=(0, 2, 3)).clamp_min(1e-3).log())

    def likelihood(self, y, step):
        """P(latent falls in [y - step/2, y + step/2]) under the prior.

        y: (B, M, H, W). step > 0: anything that broadcasts against y. Returns (B, M, H, W), values in [0, 1].
        """
        scale, weights, widths = self.log_scale.exp(), self.logits.softmax(0), self.log_widths.exp()
        p = 0.0
        for w, mu, s in zip(weights, self.means, widths):                                       # each (M,)
            w, mu, s = w[:, None, None], (mu * scale)[:, None, None], (s * scale)[:, None, None]  # (M, 1, 1)
            upper, lower = (y + step / 2 - mu) / s, (y - step / 2 - mu) / s                     # (B, M, H, W)
            # Far to the right both sigmoids are 1 - tiny, and their difference is rounding noise. By symmetry,
            # sigmoid(a) - sigmoid(b) = sigmoid(-b) - sigmoid(-a), so compute on the side where both are small.
            flip = torch.where(upper + lower > 0, -1.0, 1.0)
            p = p + w * flip * (torch.sigmoid(flip * upper) - torch.sigmoid(flip * lower))
        return p

    def bits(self, y, step):
        """-log2 likelihood, element by element: the bits an ideal coder would spend on y. Shapes as `likelihood`.

        The floor of 2^-30 stands for the escape code, which makes no symbol infinitely expensive."""
        return -torch.log2(self.likelihood(y, step) + 2.0 ** -30)


# ------------------------------------------------------------------------------------------------------
# 2. Integer tables
# ------------------------------------------------------------------------------------------------------

# No entry can be below 1 / TOTAL, so entries that nobody uses cost the others. With 2^16 and no flags (section 5) that would be 4 %
# at low rates, where most channels are nearly always zero; with flags it is next to nothing at either precision.
PRECISION = 24              # probabilities are integers out of 2^24
TOTAL = 1 << PRECISION
MAX_SYMBOL = 1023           # larger ones always escape
SCALES = tuple(2 ** (i / 2) for i in range(-3, 4))         # factors by which the prior may be stretched, see `choose_scales`


@dataclass
class Tables:
    """The prior, frozen: for each quality level q, scale s and channel m, integer cumulative counts of its symbols.

    Table (q, s, m) covers the symbols low[q, s, m] .. low[q, s, m] + size[q, s, m] - 2 and, last, an escape for all others.
    Its size + 1 cumulative counts are cdf[start[q, s, m] : start[q, s, m] + size[q, s, m] + 1]: 0, ..., 2^24.
    """
    low: torch.Tensor       # (Q, S, M) int32, the smallest symbol; never above 0
    size: torch.Tensor      # (Q, S, M) int32, number of entries, the escape included
    start: torch.Tensor     # (Q, S, M) int32, where the table begins in cdf
    cdf: torch.Tensor       # (sum of sizes + 1 each,) int32

    def validate(self):
        """Raise ValueError unless every table is one that the coder can use safely."""
        low, size, start, cdf = (t.numpy().astype(np.int64) for t in (self.low, self.size, self.start, self.cdf))
        if not (low.ndim == 3 and low.shape == size.shape == start.shape and low.shape[1] == len(SCALES) and cdf.ndim == 1 and low.size):
            raise ValueError("probability tables have the wrong shape")
        if (size < 2).any() or (low > 0).any() or (low + size - 2 < 0).any():
            raise ValueError("a probability table does not hold the symbol 0 and the escape")
        ends = (start + size + 1).ravel()
        if start.ravel()[0] != 0 or (start.ravel()[1:] != ends[:-1]).any() or ends[-1] != len(cdf):
            raise ValueError("probability tables do not lie side by side")
        if (cdf[start] != 0).any() or (cdf[start + size] != TOTAL).any():
            raise ValueError(f"a probability table does not run from 0 to {TOTAL}")
        inside = np.ones(len(cdf), bool)
        inside[start] = False                       # from one table's end to the next one's start is no step
        if (np.diff(cdf)[inside[1:]] <= 0).any():
            raise ValueError("a probability table is not strictly increasing, so some symbol has no code")
        return self

    def get(self, q, s, m):
        """(low, cumulative counts as an int64 array) of quality level q, scale s and channel m, all counted from 0."""
        a, n = int(self.start[q, s, m]), int(self.size[q, s, m])
        return int(self.low[q, s, m]), self.cdf[a:a + n + 1].numpy().astype(np.int64)


@torch.no_grad()
def freeze(prior, steps):
    """Turn a FactorizedPrior and the quantization steps, shape (Q, M), into integer Tables.

    Every symbol with a probability of at least 2^-22 gets an entry of its own (up to +-1023), the rest shares the escape.
    """
    k = torch.arange(-MAX_SYMBOL, MAX_SYMBOL + 1, dtype=torch.float64)                          # (K,)
    prior = copy.deepcopy(prior).double().cpu()
    low, size, cdf = [], [], []
    shape = len(steps), len(SCALES), steps.shape[1]
    # Stretching the distribution by a factor is the same as shrinking the step by it.
    steps = steps.detach().double().cpu()[:, None] / torch.tensor(SCALES, dtype=torch.float64)[:, None]     # (Q, S, M)
    for step in steps.flatten(0, 1):                                                            # (M,), one level and scale
        p = prior.likelihood((k * step[:, None])[None, :, :, None], step[:, None, None])        # (1, M, K, 1)
        for row in p[0, :, :, 0].numpy():                                                       # (K,)
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
    shaped = [torch.tensor(np.array(a), dtype=torch.int32).reshape(shape) for a in (low, size, start)]
    return Tables(*shaped, torch.tensor(np.concatenate(cdf), dtype=torch.int32)).validate()


# ------------------------------------------------------------------------------------------------------
# 3. The range coder
# ------------------------------------------------------------------------------------------------------
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
# The carry: adding to `low` may overflow 2^64, when the settled bytes were settled one too small. Then one is
# added to them, as in school: every trailing 255 turns to 0, and the byte before goes up by one. It can only
# happen once per byte, because low + range never grows past the end of the interval it started in.

TOP, BOTTOM, MASK = 1 << 64, 1 << 56, (1 << 64) - 1


class RangeEncoder:
    """Collects symbols given as integer intervals (start, freq) of TOTAL; `finish` returns the bytes."""

    def __init__(self):
        self.low, self.range, self.out = 0, TOP, bytearray()

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
                low = (low << 8) & MASK
                range_ <<= 8
        self.low, self.range = low, range_

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


class BitCounter(RangeEncoder):
    """Takes what a RangeEncoder takes, and only adds up in `bits` what an ideal coder would need for it: -log2 of each probability."""

    bits = 0.0

    def encode(self, starts, freqs):
        """Count a sequence of symbols."""
        self.bits += float((PRECISION - np.log2(freqs)).sum())


class RangeDecoder:
    """Mirrors RangeEncoder step by step. It keeps code = (message - low) instead of low itself, so no carry occurs.

    Invariant: 0 <= code < range for bytes that an encoder wrote; other bytes raise ValueError or decode to some symbols.
    """

    def __init__(self, data):
        self.data, self.position = data, 8
        self.code, self.range = int.from_bytes(data[:8].ljust(8, b"\0"), "big"), TOP

    def decode(self, cdf, count):
        """The next `count` symbols, all from one table: cdf is a list [0, ..., TOTAL]. Returns indices into the table."""
        code, range_, data, position, end = self.code, self.range, self.data, self.position, len(self.data)
        indices = []
        for _ in range(count):
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
        if position > end + 8:                                  # the encoder settled one byte for each that is read here
            raise ValueError("the range-coded data ends too early")
        self.code, self.range, self.position = code, range_, position
        return indices

    def decode_bits(self, count):
        """The integer that `encode_bits` was given."""
        value = 0
        for bit in self.decode([0, TOTAL // 2, TOTAL], count):
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


# ------------------------------------------------------------------------------------------------------
# 4. Scales
# ------------------------------------------------------------------------------------------------------
# The prior knows one distribution per channel, for all pictures and places. But what a patch of sky leaves in a channel is ten times
# smaller than what grass leaves there, and in all channels at once. So the encoder says for each cell (a column of the latent, 16x16
# pixels) by which of seven factors the prior is to be stretched there. This is the idea of the scale hyperprior (Balle et al. 2018) in
# its smallest form: where that has a network infer scales from a second latent, we try all seven and keep the cheapest.
#
# Their map is small and smooth, as HFD+'s is. Each entry is coded given its left neighbour; at the left edge that is the one above, and
# for the very first the middle level. Probability falls by a factor of 2^smooth with every unit of distance, down to about 2^-14: no
# statistics to learn, no table to store.

SMOOTH = 4          # of the map of scales


def _near(levels, smooth):
    """The cumulative tables of a map's entry, one for each value of its neighbour: lists [0, ..., TOTAL]."""
    tables = []
    for value in range(levels):
        weights = [(1 << smooth * (levels - abs(level - value))) + (1 << smooth * levels >> 14) for level in range(levels)]
        tables.append([TOTAL * sum(weights[:n]) // sum(weights) for n in range(levels + 1)])
    return tables


def _put_map(coder, values, levels, smooth):
    """Code an array (h, w) of integers 0 .. levels - 1 with a RangeEncoder."""
    tables, above = _near(levels, smooth), levels // 2
    for row in values.tolist():
        for neighbour, value in zip([above] + row, row):
            cdf = tables[neighbour]
            coder.encode([cdf[value]], [cdf[value + 1] - cdf[value]])
        above = row[0]


def _get_map(coder, levels, shape, smooth):
    """The int64 array (h, w) that `_put_map` was given, from a RangeDecoder."""
    tables, values, above = _near(levels, smooth), [], levels // 2
    for _ in range(shape[0]):
        left, row = above, []
        for _ in range(shape[1]):
            left = coder.decode(tables[left], 1)[0]
            row.append(left)
        values.append(row)
        above = row[0]
    return np.array(values, np.int64)


def encode_map(values, levels):
    """Code a small array (h, w) of integers 0 .. levels - 1. Returns bytes."""
    coder = RangeEncoder()
    _put_map(coder, np.asarray(values), levels, 1)
    return coder.finish()


def decode_map(data, levels, shape):
    """The inverse of `encode_map`: bytes to an int64 array of the given shape (h, w). Raises ValueError on damage."""
    return _get_map(RangeDecoder(data), levels, shape, 1)


def choose_scales(k, tables, q):
    """For each cell of the latent k (M, H, W) a scale, 0 .. S - 1: (H, W). Row after row those for which the table entries of its cells
    and those of the map cost the fewest bits. (Flags, and what follows an escape, are not counted.) An entry of the map depends on
    its left neighbour, so what is sought is the cheapest path through a row, which the Viterbi algorithm finds (Viterbi 1967): for
    each scale of a cell, the best way there is one of the best ways to the cell before."""
    costs = np.zeros((len(SCALES), k[0].size))                                                  # (S, H * W)
    for m, channel in enumerate(k.reshape(len(k), -1)):                                         # (H * W,)
        values = channel if channel.any() else channel[:1]          # a silent channel costs every cell the same
        for s in range(len(SCALES)):
            low, cdf = tables.get(q, s, m)
            index = np.clip(values - low, -1, len(cdf) - 2)                                     # -1 is the last entry, the escape
            costs[s] -= np.log2(np.diff(cdf))[index]
    change = -np.log2(np.diff(_near(len(SCALES), SMOOTH)))                                      # (S, S), bits from one to the next
    scales, above = np.zeros(k.shape[1:], np.int64), len(SCALES) // 2
    for i, row in enumerate(costs.T.reshape(*k.shape[1:], -1)):                                 # (W, S)
        total, ways = change[above] + row[0], []
        for cost in row[1:]:
            by_way = total[:, None] + change                                                    # (S, S)
            ways.append(by_way.argmin(axis=0))                                                  # (S,), from where
            total = by_way.min(axis=0) + cost                                                   # (S,)
        scales[i, -1] = total.argmin()
        for j in reversed(range(len(ways))):
            scales[i, j] = ways[j][scales[i, j + 1]]
        above = scales[i, 0]
    return scales


# ------------------------------------------------------------------------------------------------------
# 5. A whole latent
# ------------------------------------------------------------------------------------------------------

FLAG_FROM = 4       # a channel of fewer symbols has no flag: there its cost would be noticed


def _zero_flag(parts):
    """The cumulative table [0, not all zero, all zero] for a channel whose cells use several tables: parts of (low, cdf, cells).

    If P(k = 0) = p, then n symbols are all zero with p^n under the prior; so a flag of that probability costs
    an all-zero channel just what its zeros would have cost, and spares the loop over them. (But never more than 24 bits: in a
    large and smooth picture whole channels are silent, more often than independent symbols would be.) Where the flag
    says "not all zero", it cost -log2(1 - p^n) bits more than needed, half a bit on average at worst; so channels of
    fewer than FLAG_FROM symbols, where that would be noticed, have no flag. Powers by repeated squaring in
    integers of 62 bits, for floating-point powers differ between machines."""
    power = 1 << 62
    for low, cdf, cells in parts:
        base, count = int(cdf[1 - low] - cdf[-low]) << (62 - PRECISION), len(cells)
        while count:
            if count & 1:
                power = (power * base) >> 62
            base = (base * base) >> 62
            count >>= 1
    return [0, TOTAL - min(max(power >> (62 - PRECISION), 1), TOTAL - 1), TOTAL]


def _channels(tables, q, scales):
    """For each channel m its parts, one for each scale that occurs: (low, cdf, numbers of the cells of that scale)."""
    cells = [(s, np.flatnonzero(scales.ravel() == s)) for s in np.unique(scales).tolist()]
    for m in range(tables.low.shape[2]):
        yield [(*tables.get(q, s, m), numbers) for s, numbers in cells]


def _put_latent(coder, k, tables, q):
    """Give a coder all of an integer latent k, an array (M, H, W), at quality level q.

    First the map of scales. Then channel after channel: the flag "all zero", or else for one scale after the other the symbols of
    its cells, row by row, and what escapes among them stood for."""
    k = np.asarray(k, np.int64)
    scales = choose_scales(k, tables, q)
    _put_map(coder, scales, len(SCALES), SMOOTH)
    for channel, parts in zip(k.reshape(len(k), -1), _channels(tables, q, scales)):             # (H * W,)
        if len(channel) >= FLAG_FROM:
            flag = _zero_flag(parts)
            if not channel.any():
                coder.encode([flag[1]], [TOTAL - flag[1]])
                continue
            coder.encode([0], [flag[1]])
        for low, cdf, cells in parts:
            values = channel[cells]
            escape, index = len(cdf) - 2, values - low
            outside = (index < 0) | (index >= escape)
            index[outside] = escape
            coder.encode(cdf[index].tolist(), (cdf[index + 1] - cdf[index]).tolist())
            for value in values[outside].tolist():
                above = value >= low + escape
                coder.encode_bits(above, 1)
                encode_gamma(coder, value - (low + escape) + 1 if above else low - value)


def encode(k, tables, q):
    """The bytes of an integer latent k, an array of shape (M, H, W), at quality level q."""
    coder = RangeEncoder()
    _put_latent(coder, k, tables, q)
    return coder.finish()


def cross_entropy(k, tables, q):
    """The bits, a float, that an ideal coder would need for k, shape (M, H, W). `encode` comes within 0.2 % and a few bytes of it."""
    counter = BitCounter()
    _put_latent(counter, k, tables, q)
    return counter.bits


def decode(data, tables, q, shape):
    """The inverse of `encode`: bytes to an int64 array of the given shape (M, H, W). Raises ValueError on damage."""
    coder = RangeDecoder(data)
    scales = _get_map(coder, len(SCALES), shape[1:], SMOOTH)
    k = np.zeros((shape[0], shape[1] * shape[2]), np.int64)
    for channel, parts in zip(k, _channels(tables, q, scales)):
        if len(channel) >= FLAG_FROM and coder.decode(_zero_flag(parts), 1)[0]:
            continue
        for low, cdf, cells in parts:
            escape = len(cdf) - 2
            values = np.array(coder.decode(cdf.tolist(), len(cells))) + low
            for i in np.flatnonzero(values == low + escape):
                above = coder.decode_bits(1)
                distance = decode_gamma(coder)
                values[i] = low + escape + distance - 1 if above else low - distance
            channel[cells] = values
    return k.reshape(shape)
