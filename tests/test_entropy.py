"""What entropy.py promises: a prior that is a distribution, a context that both sides know, exact tables, a coder that wastes nothing."""
import math
import zlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import logistic

import entropy
from entropy import PRECISION, SHIFTS, TOTAL, WIDTHS, RangeDecoder, RangeEncoder, Tables

# ------------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------------


def table(*counts):
    """Counts to the cumulative list that the coder uses; the last entry gets what is left of 2^24."""
    return [0, *np.cumsum(counts).tolist(), TOTAL]


def code(cdf, symbols, coder=None):
    """Encode symbols (indices into one table); returns the bytes."""
    coder = coder or RangeEncoder()
    coder.encode([cdf[s] for s in symbols], [cdf[s + 1] - cdf[s] for s in symbols])
    return coder.finish()


def ideal_bits(cdf, symbols):
    """The sum of -log2 p: what an ideal coder would need."""
    return sum(PRECISION - math.log2(cdf[s + 1] - cdf[s]) for s in symbols)


def value_of(message):
    """The number in [0, 1) that a message names: its bytes are the digits after the point, in base 256."""
    return Fraction(int.from_bytes(message, "big"), 256 ** len(message))


def random_prior(channels=6, context=0.0, seed=0):
    """A prior with nothing equal about it, at three levels; with `context`, weights of about that size for all that comes before."""
    torch.manual_seed(seed)
    prior = entropy.Prior(channels, 3).double()
    for parameter, size in ((prior.logits, 0.7), (prior.log_widths, 0.7), (prior.octaves, 1), (prior.by_level, 0.1), (prior.by_pass, context),
                            (prior.shift, context), (prior.near, context), (prior.across, context / channels), (prior.window, context / channels)):
        torch.nn.init.normal_(parameter, std=size)
    with torch.no_grad():
        prior.octaves[-1] = -7                                  # the last channel is nearly always zero
    return prior.requires_grad_(False)


STEPS = torch.tensor([[4.0], [1.0], [0.25]]).repeat(1, 6)      # (Q, M): three levels, coarse to fine


def bits(prior, k, step, q):
    """What the prior itself, in floating point, says that the latent k (M, h, w) costs at level q, symbol by symbol."""
    k = torch.from_numpy(k)[None].double()
    return prior.bits(k, k, torch.full((1, 1, 1, 1), step, dtype=torch.float64), torch.tensor([q]))[0].numpy()


def some_latent(prior, step, q, shape=(6, 20, 30), seed=0):
    """Integers drawn from a prior without context: for each, one of the three logistics, then a number from it, rounded."""
    rng = np.random.default_rng(seed)
    width = (prior.octaves + prior.by_level[q]).exp2().numpy()[:, None, None] / step
    which = rng.choice(3, size=shape, p=prior.logits.softmax(0).numpy())
    return np.round(width * logistic.rvs(0, prior.log_widths.exp().numpy()[which], random_state=rng)).astype(np.int64)


def by_hand():
    """Tables made by whole-number arithmetic alone, so that they depend on no floating-point library: two levels of two channels. The wider
    a table, the more symbols have an entry of their own, each with half the count of the one nearer to zero."""
    lows, cdfs = [], []
    for t in range(WIDTHS * SHIFTS):
        reach = t // SHIFTS // 8
        counts = [1 + (TOTAL >> 2 + abs(2 * SHIFTS * k - t % SHIFTS) // SHIFTS) for k in range(-reach, reach + 1)] + [9]
        counts[reach] += TOTAL - sum(counts)
        lows.append(-reach)
        cdfs.append([0, *np.cumsum(counts).tolist()])
    ints = lambda values, dtype=torch.int32: torch.tensor(values, dtype=dtype)
    # In sixteenths, a little more in every pass.
    weights = lambda *values, unit=entropy.UNIT: ((ints([values]) + torch.arange(entropy.PASSES)[:, None]) * unit // 16).short()
    below = lambda value: ints([[0, 0], [value, 0]], torch.int16)
    return Tables(ints(lows), ints([len(c) - 1 for c in cdfs]), ints(np.cumsum([0] + [len(c) for c in cdfs[:-1]])), ints(sum(cdfs, [])),
                  ints([[0, -4], [1, -1]]) * entropy.OCTAVE, weights(3, 1, unit=entropy.OCTAVE).int(),
                  weights(12, 3), weights(9, 5, unit=entropy.WEIGHT), below(entropy.WEIGHT // 2), below(entropy.WEIGHT // 4))


HAND = by_hand().validate()

# ------------------------------------------------------------------------------------------------------
# The prior
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.02, 1.0, 30.0])
def test_every_width_gives_a_distribution(width):
    """One shape serves every quantizer and every context: whatever the width, and wherever mu, bins tile the line and P(k) sums to 1."""
    k = torch.arange(-3000, 3001, dtype=torch.float64)
    for mu in (0.0, 0.3, -7.5):
        assert math.isclose(random_prior().likelihood(k - mu, width).sum().item(), 1, abs_tol=1e-12)


def test_likelihood_is_the_closed_form():
    """P is a mixture of logistics' differences, and stays accurate far out in the tails, where 1 - tiny cancels."""
    prior, u = random_prior(), np.linspace(-60, 60, 241)
    expected = 0
    for w, s in zip(prior.logits.softmax(0).tolist(), (2.5 * prior.log_widths.exp()).tolist()):
        c = logistic(0, s)
        expected = expected + w * np.where(u < 0, c.cdf(u + 0.5) - c.cdf(u - 0.5), c.sf(u - 0.5) - c.sf(u + 0.5))
    assert np.allclose(prior.likelihood(torch.from_numpy(u), 2.5).numpy(), expected, rtol=1e-9, atol=0)


def test_the_most_likely_symbol_is_not_impossible():
    """At u = 0 the sign that picks the accurate side is undecided; torch.sign would make P(0) zero."""
    p = entropy.Prior(1, 1).likelihood(torch.zeros(1), 1.0)
    assert math.isclose(p.item(), sum(logistic(0, s).cdf(0.5) * 2 - 1 for s in (0.25, 0.625 ** 0.5, 2.5)) / 3, rel_tol=1e-5)


def test_fit_scale_makes_the_prior_blind_to_units():
    """After fit_scale a latent a hundred times larger, with a step a hundred times larger, costs the same bits."""
    y, q = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.long)
    cost = []
    for unit in (1.0, 100.0):
        prior = entropy.Prior(6, 1)
        prior.fit_scale(unit * y)
        cost.append(prior.bits(y, y.round(), torch.full((4, 1, 1, 1), unit), q).sum().item())
    assert math.isclose(*cost, rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------------
# The context
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (9, 1), (16, 24), (19, 30)])
def test_every_cell_is_coded_once_after_its_neighbours(shape):
    """From coarse to fine, each cell comes exactly once, and all that it looks at came in an earlier pass; half of them come last."""
    h, w = shape
    seen = set()
    for number, (cells, around, share) in enumerate(entropy.coarse_to_fine(h, w)):
        assert not seen & set(cells.tolist()) and set(around.ravel().tolist()) <= seen | {h * w}
        there = (around < h * w).sum(axis=0)
        assert (there > 0).all() or number == 0                 # only the first cells have nothing to look at
        assert (share * np.maximum(there, 1) == 12).all()
        seen |= set(cells.tolist())
    assert seen == set(range(h * w))
    assert min(shape) == 1 or abs(len(cells) / (h * w) - 1 / 2) < 0.05


def test_the_context_is_known_to_the_decoder():
    """What a symbol is coded with depends on nothing that comes after it: no later channel, no later pass, not itself. It sees four
    neighbours in its own channel, and in those before the cells around its own."""
    prior, k = random_prior(4, context=0.5).requires_grad_(True), torch.randn(1, 4, 9, 11, dtype=torch.float64)
    order = np.empty(99, int)
    for number, (cells, _, _) in enumerate(entropy.coarse_to_fine(9, 11)):
        order[cells] = number
    row, column = np.divmod(np.arange(99), 11)
    for m, cell, neighbours in ((0, 50, 4), (2, 0, 0), (2, 60, 4), (3, 98, 2)):
        x = k.clone().requires_grad_(True)
        mu, octaves = prior.context(x, torch.zeros(1, 4, 1, 1, dtype=torch.float64))
        (mu + octaves).flatten(2)[0, m, cell].backward()
        seen = x.grad[0].flatten(1) != 0                                                        # (4, 99)
        window = (abs(row - row[cell]) <= 1) & (abs(column - column[cell]) <= 1)
        assert not seen[m + 1:].any() and (seen[:m].numpy() == window).all() and seen[m].sum() == neighbours
        assert (order[seen[m].numpy()] < order[cell]).all()


def test_integers_have_logarithms():
    """octaves_of is OCTAVE log2 n to the nearest integer, found without floating point."""
    n = np.unique(np.round(np.logspace(0, 61, 20_000, base=2)).astype(np.int64))
    assert np.abs(entropy.octaves_of(n) - entropy.OCTAVE * np.log2(n)).max() < 0.501
    assert entropy.octaves_of(1 << np.arange(62)).tolist() == [entropy.OCTAVE * octave for octave in range(62)]


def test_context_saves_bits():
    """Neighbours tell a smooth channel's mean, and where they are large, or other channels are, so is a symbol: each weight saves bits."""
    rng = np.random.default_rng(0)
    smooth = np.round(40 * np.sin(np.add.outer(np.arange(20), np.arange(30)) / 9)).astype(np.int64)
    size = np.where(np.arange(30) < 15, 0.1, 8.0)
    k = np.stack([smooth, *np.round(size * rng.standard_normal((5, 20, 30))).astype(np.int64)])
    cost = {}
    for name in ("none", "shift", "near", "across", "window"):
        prior = entropy.Prior(6, 1).double().requires_grad_(False)
        for weights in (prior.near, prior.across, prior.window):
            weights.zero_()
        prior.octaves[0] = 3
        if name == "shift":
            prior.shift[:, 0], prior.octaves[0] = 1, 1
        elif name == "near":
            prior.near[:, 1:], prior.octaves[1:] = 1, -2
        elif name != "none":
            prior.octaves[2:], getattr(prior, name)[2:, 1:] = -2, 1.5 / torch.arange(1, 5)[:, None]     # the mean of those before
        tables = entropy.freeze(prior, torch.ones(1, 6))
        data = entropy.encode(k, tables, 0)
        assert (entropy.decode(data, tables, 0, k.shape) == k).all()
        cost[name] = len(data)
        if name != "none":
            deaf = replace(tables, **{name: torch.zeros_like(getattr(tables, name))})
            assert len(data) < 0.9 * min(cost["none"], len(entropy.encode(k, deaf, 0)))


# ------------------------------------------------------------------------------------------------------
# The tables
# ------------------------------------------------------------------------------------------------------


def of_tables(tables, t):
    """(low, cumulative counts) of table t."""
    return int(tables.low[t]), tables.cdf[tables.start[t]:tables.start[t] + tables.size[t] + 1].tolist()


def test_frozen_tables_are_valid():
    """Freezing keeps three promises for every width and shift: start 0, end 2^24, strictly increasing, so that every symbol has a code."""
    tables = entropy.freeze(random_prior(context=100.0), STEPS)                 # weights beyond what fits are cut, not wrapped around
    for t in range(WIDTHS * SHIFTS):
        low, cdf = of_tables(tables, t)
        assert cdf[0] == 0 and cdf[-1] == TOTAL and (np.diff(cdf) > 0).all()
        assert low <= 0 <= low + len(cdf) - 3                                   # 0 has an entry; the last is the escape
    assert tables.near.max() == tables.shift.max() == 32767 and tables.shift.min() == -32768


def test_freezing_costs_next_to_nothing():
    """24 bits suffice: coding the prior's own symbols with the integer tables costs less than 0.02 % more bits."""
    prior = random_prior()
    tables, k = entropy.freeze(prior, STEPS), torch.arange(-1000.0, 1001, dtype=torch.float64)
    for t in range(WIDTHS * SHIFTS):
        p = prior.likelihood(k - (t % SHIFTS / SHIFTS - 0.5), 2.0 ** ((t // SHIFTS + entropy.FINEST) / 4)).numpy()
        low, cdf = of_tables(tables, t)
        counts = np.diff(cdf)
        inside = slice(1000 + max(low, -1000), 1000 + min(low + len(counts) - 1, 1001))
        counts = counts[-min(low + 1000, 0):]
        rest = 1 - p[inside].sum()
        spent = -(p[inside] * np.log2(counts[:inside.stop - inside.start] / TOTAL)).sum() - rest * np.log2(counts[-1] / TOTAL)
        ideal = -(p[inside] * np.log2(p[inside])).sum() - rest * np.log2(max(rest, 1e-30))
        assert 0 <= spent - ideal + 1e-9 < 2e-4 * ideal + 2e-6


COUNT = int(HAND.cdf[int(HAND.start[-1]) + 1])                  # some count inside a table

DAMAGE = {
    "tables have the wrong shape": lambda t: replace(t, size=t.size[:1]),
    "symbol 0": lambda t: replace(t, low=t.low + 20),
    "symbol 0 and": lambda t: replace(t, low=t.low - 50),
    "and the escape": lambda t: replace(t, size=t.size * 0 + 1),
    "side by side": lambda t: replace(t, start=t.start + 1),
    "lie side by side": lambda t: replace(t, cdf=torch.cat([t.cdf, t.cdf[:3]])),
    "from 0": lambda t: replace(t, cdf=t.cdf + (t.cdf == 0).int()),
    "to 16777216": lambda t: replace(t, cdf=t.cdf - (t.cdf == TOTAL).int() * 2),
    "increasing": lambda t: replace(t, cdf=torch.where(t.cdf == COUNT, 2 ** 23, t.cdf)),
    "has no code": lambda t: replace(t, cdf=torch.where(t.cdf == COUNT, -7, t.cdf)),
    "context model has the wrong shape": lambda t: replace(t, near=t.near[:, :1]),
    "model has the wrong shape": lambda t: replace(t, octaves=t.octaves[:0]),
    "the context model has the wrong": lambda t: replace(t, across=t.across[None]),
    "integers of the right size": lambda t: replace(t, across=t.across.int()),
    "not made of integers": lambda t: replace(t, cdf=t.cdf.float()),
    "or too much": lambda t: replace(t, low=t.low - 2000, size=t.size + 2000),
    "context model has the wrong": lambda t: replace(t, window=t.window[:1]),
    "weighs sizes with less than nothing": lambda t: replace(t, near=t.near * 0 - 1),
    "sizes with less than nothing": lambda t: replace(t, across=t.across * 0 - 1),
    "with less than nothing": lambda t: replace(t, window=t.window * 0 - 1),
    "widths that there are no tables for": lambda t: replace(t, octaves=t.octaves + 10 * entropy.OCTAVE),
    "that there are no tables for": lambda t: replace(t, octaves=t.octaves - 10 * entropy.OCTAVE),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_tables_are_refused(message):
    """A table that is not a staircase from 0 to 2^24 would decode wrongly without a word, so validate() names the fault."""
    HAND.validate()
    with pytest.raises(ValueError, match=message):
        DAMAGE[message](HAND).validate()


# ------------------------------------------------------------------------------------------------------
# The range coder
# ------------------------------------------------------------------------------------------------------


def test_coding_is_narrowing_an_interval():
    """Where probabilities are powers of 1/2 nothing is rounded: the message is the shortest number in the textbook interval."""
    cdf, rng = table(TOTAL // 2, TOTAL // 4, TOTAL // 8), np.random.default_rng(1)
    for length in range(60):
        symbols, low, width = rng.integers(0, 4, length).tolist(), Fraction(0), Fraction(1)
        for s in symbols:
            low, width = low + width * Fraction(cdf[s], TOTAL), width * Fraction(cdf[s + 1] - cdf[s], TOTAL)
        message = code(cdf, symbols)
        assert low <= value_of(message) < low + width
        if message:
            digits = 256 ** (len(message) - 1)
            assert Fraction(math.ceil(low * digits), digits) >= low + width     # no shorter message lies in it
        assert RangeDecoder(message).decode([cdf] * length) == symbols


def test_coder_against_exact_rational_arithmetic():
    """The 64-bit coder with its carries equals one that keeps the whole number, and loses < 2^-32 of the width per symbol."""
    cdf, rng = table(3, 9_000_000, 5_592_405, 1, 1234), np.random.default_rng(2)
    for length in range(0, 120, 7):
        symbols = rng.integers(0, len(cdf) - 1, length).tolist()
        low, unit, width, ideal = Fraction(0), Fraction(1, 1 << 64), Fraction(1), Fraction(1)
        for s in symbols:                                       # `unit` is the last digit that the coder keeps
            share = width / unit // TOTAL * unit
            low, width = low + share * cdf[s], share * (cdf[s + 1] - cdf[s])
            ideal *= Fraction(cdf[s + 1] - cdf[s], TOTAL)
            while width < unit * (1 << 56):
                unit /= 256
        message = code(cdf, symbols)
        assert low <= value_of(message) < low + width
        assert ideal * (1 - Fraction(1, 1 << 32)) ** length <= width <= ideal
        assert RangeDecoder(message).decode([cdf] * length) == symbols


class Watched(RangeEncoder):
    """Records how many bytes of 255 each carry ran through."""

    def __init__(self):
        super().__init__()
        self.runs = []

    def _carry(self):
        self.runs.append(len(self.out) - len(self.out.rstrip(b"\xff")))
        super()._carry()


def test_a_carry_runs_through_bytes_already_sent():
    """Symbols whose interval straddles 1/2 send 7f ff ff ff ... until the last one decides, and the carry makes it 80 00 00 ..."""
    cdf = table(5592405, 5592406)
    runs = []
    for length in range(1, 200, 3):
        symbols = RangeDecoder(b"\x80" + bytes(50)).decode([cdf] * (length))      # the symbols that lead to exactly 1/2
        for last in range(3):
            coder = Watched()
            message = code(cdf, symbols + [last] * 50, coder)   # 50 more: the carry happens while coding, not at the end
            runs += coder.runs
            assert RangeDecoder(message).decode([cdf] * (length + 50)) == symbols + [last] * 50
    assert max(runs) > 30


def test_skewed_streams():
    """A symbol of probability 1 - 2^-23 costs next to nothing, 200,000 of them a byte at most; one of 2^-24 costs three bytes."""
    cdf = table(1, TOTAL - 2)
    assert len(code(cdf, [1] * 200_000)) <= 1
    symbols = [1] * 50_000
    for i in (0, 777, 25_000, 25_001, 49_999):
        symbols[i] = 2 * (i % 2)
    message = code(cdf, symbols)
    assert RangeDecoder(message).decode([cdf] * (len(symbols))) == symbols
    assert 8 * len(message) <= ideal_bits(cdf, symbols) + 8
    rare = [0, 2] * 500
    assert len(code(cdf, rare)) <= 3 * len(rare) + 1 and RangeDecoder(code(cdf, rare)).decode([cdf] * (1000)) == rare


def test_empty_and_one_symbol_streams():
    """Nothing needs no bytes at all, and one symbol of probability p at most -log2(p) / 8 bytes, rounded up."""
    cdf = table(1, 255, 2 ** 16, 2 ** 23)
    assert code(cdf, []) == b"" and RangeDecoder(b"").decode([cdf] * (0)) == []
    for s in range(5):
        message = code(cdf, [s])
        assert len(message) <= math.ceil(ideal_bits(cdf, [s]) / 8)
        assert RangeDecoder(message).decode([cdf] * (1)) == [s]


@pytest.mark.parametrize("seed", range(5))
def test_length_is_the_entropy(seed):
    """The coder needs at most one byte more than the sum of -log2 p, whatever the table and however long the stream."""
    rng = np.random.default_rng(seed)
    cdf = table(*(1 + rng.dirichlet(np.full(20, 0.1)) * (TOTAL - 100)).astype(int))
    symbols = rng.choice(len(cdf) - 1, size=10_000, p=np.diff(cdf) / TOTAL).tolist()
    message = code(cdf, symbols)
    assert 8 * len(message) <= ideal_bits(cdf, symbols) + 8
    assert RangeDecoder(message).decode([cdf] * (len(symbols))) == symbols


def test_elias_gamma():
    """An integer n >= 1 takes 2 floor(log2 n) + 1 bits, and comes back; no table and no upper bound are needed."""
    for n in [*range(1, 70), 2 ** 20 - 1, 2 ** 20, 2 ** 31 - 1]:
        coder = RangeEncoder()
        for _ in range(8):                                      # eight times: then the bits are whole bytes
            entropy.encode_gamma(coder, n)
        coder.encode_bits(1, 1)                                 # a last bit of 1, so that no zeros can be trimmed
        message = coder.finish()
        assert len(message) == 2 * int(math.log2(n)) + 1 + 1
        decoder = RangeDecoder(message)
        assert [entropy.decode_gamma(decoder) for _ in range(8)] == [n] * 8


# ------------------------------------------------------------------------------------------------------
# Whole latents
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0.0, 0.3])
@pytest.mark.parametrize("q", range(3))
def test_real_bytes_are_as_few_as_estimated(q, context):
    """The number that training minimises is the file size: coded bits lie within 0.2 % + 16 bytes of the cross-entropy, and that within
    1 % of the prior's own in floating point. (Widths are rounded to quarters of an octave, and mu to eighths.)"""
    prior, step = random_prior(context=context), STEPS[q, 0].item()
    tables, k = entropy.freeze(prior, STEPS), some_latent(random_prior(), step, q)
    data = entropy.encode(k, tables, q)
    assert (entropy.decode(data, tables, q, k.shape) == k).all()
    estimate = entropy.coded(k, tables, q).bits / 8
    assert estimate > 300 and abs(len(data) - estimate) <= 0.002 * estimate + 16
    assert math.isclose(bits(prior, k, step, q).sum() / 8, estimate, rel_tol=0.01)


def test_large_weights_are_frozen_too():
    """Learned weights of sizes reach 7: the integer tables hold them, and still cost within 1 % of the prior's own in floating point."""
    prior = random_prior(context=0.3)
    prior.near[2], prior.across[3:5, 2], prior.window[3:5, 1] = 2, 7, 3
    tables, k = entropy.freeze(prior, STEPS), some_latent(random_prior(), 1.0, 1)
    assert math.isclose(bits(prior, k, 1.0, 1).sum(), entropy.coded(k, tables, 1).bits, rel_tol=0.01)


@pytest.mark.parametrize("step", [1.0, 2.0, 4.0])
def test_the_smallest_picture_wastes_little_too(step):
    """16x16 pixels are one symbol in each of hundreds of channels: there, too, the coder stays within 0.2 % + 16 bytes."""
    prior = random_prior(channels=320)
    tables = entropy.freeze(prior, torch.full((3, 320), step))
    for seed in range(8):
        k = some_latent(prior, step, 0, (320, 1, 1), seed)
        assert len(entropy.encode(k, tables, 0)) <= 1.002 * entropy.coded(k, tables, 0).bits / 8 + 16


def test_rare_values_escape():
    """A value outside its table, however far, is sent as the escape symbol, a sign and an Elias-gamma code."""
    for extreme in (2, -2, 3, -3, 1000, -1000, 2 ** 20, -2 ** 20, 2 ** 30, -2 ** 30):
        k = np.zeros((2, 3, 4), np.int64)
        k[0, 1, 1], k[1, 2, 3] = extreme, -extreme
        data = entropy.encode(k, HAND, 0)
        assert (entropy.decode(data, HAND, 0, k.shape) == k).all()
        assert 8 * len(data) <= entropy.coded(k, HAND, 0).bits + 128


@pytest.mark.parametrize("q", [0, 1])
def test_zero_channels_cost_what_their_zeros_would(q):
    """The flag for an all-zero channel has the probability that the prior gives to all its zeros: a short cut, not a discount.
    (Below 2^-24, which no integer table can express, it is one; so the count stays small here.)"""
    prior = random_prior()
    tables = entropy.freeze(prior, STEPS)
    for count in (1, 3, 10):
        k = np.zeros((6, 1, count), np.int64)
        zeros = 2.0 ** -bits(prior, k, STEPS[q, 0].item(), q).sum(axis=(1, 2))                  # (6,)
        assert math.isclose(entropy.coded(k, tables, q).bits, -np.log2(np.maximum(zeros, 2.0 ** -24)).sum(), rel_tol=0.05, abs_tol=1e-3)
        assert not entropy.decode(entropy.encode(k, tables, q), tables, q, k.shape).any()


def test_bytes_that_no_encoder_wrote():
    """The decoder never runs away: any bytes decode to some symbols of the right shape, or raise ValueError."""
    rng = np.random.default_rng(3)
    for data in (b"", b"\xff" * 100, *(rng.bytes(int(n)) for n in rng.integers(0, 60, 300))):
        try:
            k = entropy.decode(data, HAND, len(data) % 2, (2, 4, 5))
        except ValueError as error:
            assert "damaged" in str(error) or "too early" in str(error)
        else:
            assert k.shape == (2, 4, 5) and k.dtype == np.int64
    with pytest.raises(ValueError, match="too early"):          # a picture's worth of symbols from no bytes at all
        RangeDecoder(b"").decode([table(5592405, 5592406)] * 100_000)
    with pytest.raises(ValueError, match="damaged"):            # the code beyond the last interval, which rounding leaves over
        RangeDecoder(b"\xff" * 100).decode([table(5592405, 5592406)] * 100)
    with pytest.raises(ValueError, match="damaged"):            # an Elias-gamma code of zeros would go on for ever
        entropy.decode_gamma(RangeDecoder(bytes(100)))


def test_the_context_is_exact():
    """Nothing in it is rounded or overflows: its one product in floating point is of integers small enough to be exact; and the largest symbols
    that can grow from pass to pass, when each is expected to be twice its neighbours' mean and is 2^30 more, still come back, whatever the weights."""
    rng = np.random.default_rng(0)
    largest = entropy.WIDTH * entropy.LARGEST
    weights, known = rng.integers(0, 2 ** 15, 320), rng.integers(0, largest + 1, (320, 500))
    assert ((weights.astype(float) @ known.astype(float)).astype(np.int64) == weights @ known).all()
    assert 2 ** 14 * 2 ** 15 * largest <= 2 ** 53               # validate() refuses as many channels
    symbol = (2 ** entropy.PASSES - 1) * 2 ** 31                # that the Elias-gamma code can lead to, in Python's unbounded integers
    assert symbol * 2 ** 18 < 2 ** 63 and 12 * symbol * 2 ** 15 * SHIFTS + 6 * entropy.UNIT < 2 ** 63
    most = {name: torch.full_like(getattr(HAND, name), 2 ** 15 - 1) for name in ("near", "across", "window")}
    for octaves in (entropy.LIMITS[0], entropy.LIMITS[1]):
        widths = torch.full_like(HAND.octaves, int(octaves * entropy.OCTAVE))
        for sign in (1, -1):
            k, tables = np.zeros((2, 17 * 17), np.int64), replace(HAND, octaves=widths, shift=torch.full_like(HAND.shift, sign * (2 ** 15 - 1)), **most)
            for cells, around, share in entropy.coarse_to_fine(17, 17):
                k[:, cells] = sign * 2 * (np.append(k[0], 0)[around].sum(0) * share) // 12 + 2 ** 30
            k = k.reshape(2, 17, 17)
            assert k.max() >= 2 ** 30 and (entropy.decode(entropy.encode(k, tables.validate(), 0), tables, 0, k.shape) == k).all()


def test_decoding_is_integer_arithmetic():
    """Symbols come from integer tables alone: precision and number of threads, which change floats, cannot change them."""
    prior = random_prior(context=0.3)
    tables, k = entropy.freeze(prior, STEPS), some_latent(prior, 1.0, 1)
    data, threads = entropy.encode(k, tables, 1), torch.get_num_threads()
    try:
        for dtype, count in ((torch.float64, 1), (torch.float16, 2), (torch.bfloat16, 3)):
            torch.set_default_dtype(dtype)
            torch.set_num_threads(count)
            assert entropy.encode(k, tables, 1) == data
            assert (entropy.decode(data, tables, 1, k.shape) == k).all()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def test_energy_maps_round_trip_and_smooth_ones_are_cheap():
    """The HFD+ map is coded from neighbour to neighbour: any map comes back, and one that hardly varies costs less than two bits a value."""
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (7, 1), (12, 16)):
        rough = rng.integers(0, 8, shape)
        assert (entropy.decode_map(entropy.encode_map(rough, 8), 8, shape) == rough).all()
        assert entropy.decode_map(rng.bytes(200), 8, shape).shape == shape          # bytes that no encoder wrote
    smooth = (np.add.outer(np.arange(12), np.arange(16)) // 8) % 8
    assert (entropy.decode_map(entropy.encode_map(smooth, 8), 8, smooth.shape) == smooth).all()
    assert 8 * len(entropy.encode_map(smooth, 8)) < 1.8 * smooth.size < 8 * len(entropy.encode_map(rough, 8))


def test_the_format_does_not_drift():
    """Bytes recorded when version 3 of the format was fixed: if this fails, old files no longer decode, so raise the version."""
    small = np.array([[[0, 1, -1, 0], [5, 0, 0, -300]], [[0, 0, 0, 0], [0, 0, 0, 1]]])
    large = (np.arange(680) * 7919 % 23 // 5 - 2).reshape(2, 17, 20)            # all passes
    for k, q, text in ((small, 0, "201a1f6bf689e1b541788e31fffc66c99d918c"), (small, 1, "201a1f6bf6758fc11af88e31fffc66c99d9187"), (0 * small, 1, "fd")):
        assert entropy.encode(k, HAND, q).hex() == text
        assert (entropy.decode(bytes.fromhex(text), HAND, q, k.shape) == k).all()
    assert zlib.crc32(entropy.encode(large, HAND, 0)) == 1378199043
    assert entropy.encode_map([[4, 4, 5], [3, 3, 7]], 8).hex() == "8b8a"
