"""What entropy.py promises: a prior that is a distribution, tables that are exact, a coder that wastes nothing."""
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import logistic

import entropy
from entropy import PRECISION, SCALES, TOTAL, RangeDecoder, RangeEncoder, Tables

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


def random_prior(channels=6, seed=0):
    """A prior with nothing symmetric or equal about it."""
    torch.manual_seed(seed)
    prior = entropy.FactorizedPrior(channels).double()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    with torch.no_grad():
        prior.log_scale[-1] = -5                                # the last channel is nearly always zero
    return prior.requires_grad_(False)


STEPS = torch.tensor([[4.0], [1.0], [0.25]]).repeat(1, 6)      # (Q, M): three levels, coarse to fine


def some_latent(prior, step, shape=(6, 20, 30), seed=0):
    """Integers drawn from the prior itself: for each, one of the three logistics, then a number from it, rounded."""
    rng = np.random.default_rng(seed)
    scale, weights = prior.log_scale.exp().numpy(), prior.logits.softmax(0).numpy()
    means, widths = prior.means.numpy(), prior.log_widths.exp().numpy()
    k = np.zeros(shape, np.int64)
    for m in range(shape[0]):
        which = rng.choice(3, size=shape[1:], p=weights[:, m])
        y = scale[m] * logistic.rvs(means[which, m], widths[which, m], random_state=rng)
        k[m] = np.round(y / step)
    return k


def by_hand():
    """A table set written out by hand, two levels of two channels: it does not depend on any floating-point library. In both, the three
    smallest scales expect nearly nothing but zeros, and the three largest anything."""
    quiet, loud = [(0, [0, TOTAL - 20000, TOTAL]), (0, [0, TOTAL - 3, TOTAL])], [(-2, [0, 2 ** 20, 2 ** 22, 3 * 2 ** 22, TOTAL - 70000, TOTAL - 9, TOTAL])] * 2
    tables = []
    for middle in ([(-1, [0, 2 ** 20, 15 * 2 ** 20, TOTAL - 9, TOTAL]), (0, [0, TOTAL - 1, TOTAL])],
                   [(-2, [0, 1, 2 ** 22, 3 * 2 ** 22, TOTAL - 70000, TOTAL - 1, TOTAL]), (-1, [0, 5592405, 11184811, TOTAL - 3, TOTAL])]):
        tables += 3 * quiet + middle + 3 * loud
    low, cdf = zip(*tables)
    shaped = [torch.tensor(a, dtype=torch.int32).reshape(2, len(SCALES), 2) for a in
              (low, [len(c) - 1 for c in cdf], np.cumsum([0] + [len(c) for c in cdf[:-1]]))]
    return Tables(*shaped, torch.tensor(sum(cdf, []), dtype=torch.int32))


HAND = by_hand()

# ------------------------------------------------------------------------------------------------------
# The prior
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.1, 1.0, 7.0])
def test_every_step_size_gives_a_distribution(step):
    """One continuous prior serves every quantizer: whatever the step, the bins tile the line and P(k) sums to 1."""
    reach = math.ceil(400 / step)
    k = torch.arange(-reach, reach + 1, dtype=torch.float64)[None, None, :, None]
    total = random_prior().likelihood(k.repeat(1, 6, 1, 1) * step, step).sum(dim=(0, 2, 3))
    assert torch.allclose(total, torch.ones(6, dtype=torch.float64), atol=1e-12)


def test_likelihood_is_the_closed_form():
    """P is a mixture of logistics' differences, and stays accurate far out in the tails, where 1 - tiny cancels."""
    prior, y = random_prior(), np.linspace(-60, 60, 241)
    got = prior.likelihood(torch.from_numpy(y)[None, None, :, None].repeat(1, 6, 1, 1), 0.5)[0, :, :, 0].numpy()
    weights, scale = prior.logits.softmax(0).numpy(), prior.log_scale.exp().numpy()
    for m in range(6):
        expected = 0
        for i in range(3):
            mixture = logistic(float(prior.means[i, m]) * scale[m], float(prior.log_widths[i, m].exp()) * scale[m])
            left, right = mixture.cdf(y + 0.25) - mixture.cdf(y - 0.25), mixture.sf(y - 0.25) - mixture.sf(y + 0.25)
            expected = expected + weights[i, m] * np.where(y < mixture.mean(), left, right)
        assert np.allclose(got[m], expected, rtol=1e-9, atol=0)


def test_the_most_likely_symbol_of_a_symmetric_prior_is_not_impossible():
    """At y = 0 and mean 0 the sign that picks the accurate side is undecided; torch.sign would make P(0) zero."""
    p = entropy.FactorizedPrior(1).likelihood(torch.zeros(1, 1, 1, 1), 1.0)
    assert math.isclose(p.item(), sum(logistic(0, s).cdf(0.5) * 2 - 1 for s in (0.25, 0.625 ** 0.5, 2.5)) / 3, rel_tol=1e-5)


def test_fit_scale_makes_the_prior_blind_to_units():
    """After fit_scale a latent a hundred times larger, with a step a hundred times larger, costs the same bits."""
    y = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    bits = []
    for unit in (1.0, 100.0):
        prior = entropy.FactorizedPrior(6)
        prior.fit_scale(unit * y)
        bits.append(prior.bits(unit * y, torch.tensor(unit)).sum().item())
    assert math.isclose(*bits, rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------------
# The tables
# ------------------------------------------------------------------------------------------------------


def test_frozen_tables_are_valid():
    """Freezing keeps three promises for any step: start 0, end 2^24, strictly increasing, so that every symbol has a code."""
    steps = torch.tensor([1e-4, 0.02, 1.0, 30.0, 1e5])[:, None].repeat(1, 6)
    tables = entropy.freeze(random_prior(), steps)
    for table in itertools.product(range(5), range(len(SCALES)), range(6)):
        low, cdf = tables.get(*table)
        assert cdf[0] == 0 and cdf[-1] == TOTAL and (np.diff(cdf) > 0).all()
        assert low <= 0 <= low + len(cdf) - 3                                   # 0 has an entry; the last is the escape
    assert int(tables.size.max()) == 2 * entropy.MAX_SYMBOL + 2 and int(tables.size.min()) == 2


def test_freezing_costs_next_to_nothing():
    """24 bits suffice: coding the prior's own symbols with the integer tables costs less than 0.02 % more bits."""
    prior = random_prior()
    tables, k = entropy.freeze(prior, STEPS), torch.arange(-1000.0, 1001, dtype=torch.float64)
    for q, s, m in itertools.product(range(3), range(len(SCALES)), range(6)):
        step = STEPS[q, m] / SCALES[s]
        p = prior.likelihood(k[None, None, :, None].repeat(1, 6, 1, 1) * step, step)[0, m, :, 0].numpy()
        low, cdf = tables.get(q, s, m)
        counts = np.diff(cdf)
        inside = slice(1000 + low, 1000 + low + len(counts) - 1)
        rest = 1 - p[inside].sum()
        spent = -(p[inside] * np.log2(counts[:-1] / TOTAL)).sum() - rest * np.log2(counts[-1] / TOTAL)
        ideal = -(p[inside] * np.log2(p[inside])).sum() - rest * np.log2(max(rest, 1e-30))
        assert 0 <= spent - ideal + 1e-9 < 2e-4 * ideal + 2e-6


DAMAGE = {
    "shape": lambda t: replace(t, size=t.size[:1]),
    "symbol 0": lambda t: replace(t, low=t.low + 5),
    "symbol 0 and": lambda t: replace(t, low=t.low - 50),
    "and the escape": lambda t: replace(t, size=t.size * 0 + 1),
    "side by side": lambda t: replace(t, start=t.start + 1),
    "lie side by side": lambda t: replace(t, cdf=torch.cat([t.cdf, t.cdf[:3]])),
    "from 0": lambda t: replace(t, cdf=t.cdf + (t.cdf == 0).int()),
    "to 16777216": lambda t: replace(t, cdf=t.cdf - (t.cdf == TOTAL).int() * 2),
    "increasing": lambda t: replace(t, cdf=torch.where(t.cdf == 15 * 2 ** 20, 2 ** 20, t.cdf)),
    "has no code": lambda t: replace(t, cdf=torch.where(t.cdf == 15 * 2 ** 20, -7, t.cdf)),
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
        assert RangeDecoder(message).decode(cdf, length) == symbols


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
        assert RangeDecoder(message).decode(cdf, length) == symbols


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
        symbols = RangeDecoder(b"\x80" + bytes(50)).decode(cdf, length)      # the symbols that lead to exactly 1/2
        for last in range(3):
            coder = Watched()
            message = code(cdf, symbols + [last] * 50, coder)   # 50 more: the carry happens while coding, not at the end
            runs += coder.runs
            assert RangeDecoder(message).decode(cdf, length + 50) == symbols + [last] * 50
    assert max(runs) > 30


def test_skewed_streams():
    """A symbol of probability 1 - 2^-23 costs next to nothing, 200,000 of them a byte at most; one of 2^-24 costs three bytes."""
    cdf = table(1, TOTAL - 2)
    assert len(code(cdf, [1] * 200_000)) <= 1
    symbols = [1] * 50_000
    for i in (0, 777, 25_000, 25_001, 49_999):
        symbols[i] = 2 * (i % 2)
    message = code(cdf, symbols)
    assert RangeDecoder(message).decode(cdf, len(symbols)) == symbols
    assert 8 * len(message) <= ideal_bits(cdf, symbols) + 8
    rare = [0, 2] * 500
    assert len(code(cdf, rare)) <= 3 * len(rare) + 1 and RangeDecoder(code(cdf, rare)).decode(cdf, 1000) == rare


def test_empty_and_one_symbol_streams():
    """Nothing needs no bytes at all, and one symbol of probability p at most -log2(p) / 8 bytes, rounded up."""
    cdf = table(1, 255, 2 ** 16, 2 ** 23)
    assert code(cdf, []) == b"" and RangeDecoder(b"").decode(cdf, 0) == []
    for s in range(5):
        message = code(cdf, [s])
        assert len(message) <= math.ceil(ideal_bits(cdf, [s]) / 8)
        assert RangeDecoder(message).decode(cdf, 1) == [s]


@pytest.mark.parametrize("seed", range(5))
def test_length_is_the_entropy(seed):
    """The coder needs at most one byte more than the sum of -log2 p, whatever the table and however long the stream."""
    rng = np.random.default_rng(seed)
    cdf = table(*(1 + rng.dirichlet(np.full(20, 0.1)) * (TOTAL - 100)).astype(int))
    symbols = rng.choice(len(cdf) - 1, size=10_000, p=np.diff(cdf) / TOTAL).tolist()
    message = code(cdf, symbols)
    assert 8 * len(message) <= ideal_bits(cdf, symbols) + 8
    assert RangeDecoder(message).decode(cdf, len(symbols)) == symbols


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


def map_bits(scales):
    """What the map of scales costs: -log2 of each entry's probability given its left neighbour, or the one above at the left edge."""
    near = np.diff(entropy._near(len(SCALES), entropy.SMOOTH)) / TOTAL
    first = np.concatenate([[len(SCALES) // 2], scales[:-1, 0]])
    return -np.log2(near[np.concatenate([first[:, None], scales[:, :-1]], axis=1), scales]).sum()


def test_scales_follow_the_picture():
    """Where a latent is smaller or larger than usual in all channels at once, the prior is shrunk or stretched, and that saves bits."""
    prior = random_prior(channels=40)
    step = torch.full((1, 40), 0.25)
    tables, k = entropy.freeze(prior, step), some_latent(prior, 0.25, (40, 12, 20))
    plain = float(prior.bits(torch.from_numpy(k)[None] * 0.25, torch.tensor(0.25).double()).sum())
    assert abs(entropy.cross_entropy(k, tables, 0) / plain - 1) < 0.02          # drawn from the prior itself: nothing to gain
    assert np.abs(entropy.choose_scales(k, tables, 0) - 3).mean() < 1
    k = np.concatenate([np.round(k[:, :, :10] / 3), k[:, :, 10:] * 3], axis=2).astype(np.int64)
    scales = entropy.choose_scales(k, tables, 0)
    assert scales[:, :10].mean() < 1.5 and scales[:, 10:].mean() > 4.5
    plain = float(prior.bits(torch.from_numpy(k)[None] * 0.25, torch.tensor(0.25).double()).sum())
    assert entropy.cross_entropy(k, tables, 0) < 0.95 * plain


def test_no_cheaper_scales_exist():
    """The Viterbi search is exact: of all ways to give three cells a scale, it finds one that costs no more than any other."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        k = rng.integers(-2, 3, (2, 1, 3)) * rng.integers(0, 2, (2, 1, 3))
        cost = {}
        for scales in itertools.product(range(len(SCALES)), repeat=3):
            symbols = 0.0
            for m, (cell, s) in itertools.product(range(2), enumerate(scales)):
                low, cdf = HAND.get(1, s, m)
                index = k[m, 0, cell] - low
                index = index if 0 <= index < len(cdf) - 2 else len(cdf) - 2    # the escape
                symbols += ideal_bits(cdf.tolist(), [index])
            cost[scales] = symbols + map_bits(np.array([scales]))
        assert cost[tuple(entropy.choose_scales(k, HAND, 1)[0])] == pytest.approx(min(cost.values()))


@pytest.mark.parametrize("q", range(3))
def test_real_bytes_are_as_few_as_estimated(q):
    """The number that training minimises is the file size: coded bits lie within 0.2 % + 16 bytes of the cross-entropy."""
    prior = random_prior()
    tables, k = entropy.freeze(prior, STEPS), some_latent(prior, STEPS[q, 0].item())
    data = entropy.encode(k, tables, q)
    assert (entropy.decode(data, tables, q, k.shape) == k).all()
    estimate = entropy.cross_entropy(k, tables, q) / 8
    assert estimate > 300 and abs(len(data) - estimate) <= 0.002 * estimate + 16
    scales = entropy.choose_scales(k, tables, q)                # and the estimate in turn is the prior's own
    step = STEPS[q, 0].double() / torch.tensor(SCALES, dtype=torch.float64)[scales]                 # (H, W)
    symbols = float(prior.bits(torch.from_numpy(k)[None] * step, step).sum())
    assert math.isclose((symbols + map_bits(scales)) / 8, estimate, rel_tol=0.002)


@pytest.mark.parametrize("step", [1.0, 2.0, 4.0])
def test_the_smallest_picture_wastes_little_too(step):
    """16x16 pixels are one symbol in each of hundreds of channels: there, too, the coder stays within 0.2 % + 16 bytes."""
    prior = random_prior(channels=320)
    tables = entropy.freeze(prior, torch.full((1, 320), step))
    for seed in range(8):
        k = some_latent(prior, step, (320, 1, 1), seed)
        assert len(entropy.encode(k, tables, 0)) <= 1.002 * entropy.cross_entropy(k, tables, 0) / 8 + 16


def test_rare_values_escape():
    """A value outside its table, however far, is sent as the escape symbol, a sign and an Elias-gamma code."""
    for extreme in (2, -2, 3, -3, 1000, -1000, 2 ** 20, -2 ** 20, 2 ** 30, -2 ** 30):
        k = np.zeros((2, 3, 4), np.int64)
        k[0, 1, 1], k[1, 2, 3] = extreme, -extreme
        data = entropy.encode(k, HAND, 0)
        assert (entropy.decode(data, HAND, 0, k.shape) == k).all()
        assert 8 * len(data) <= entropy.cross_entropy(k, HAND, 0) + 128


@pytest.mark.parametrize("q", [0, 1])
def test_zero_channels_cost_what_their_zeros_would(q):
    """The flag for an all-zero channel has the probability that the prior gives to all its zeros: a short cut, not a discount.
    (Below 2^-24, which no integer table can express, it is one; so the count stays small here.)"""
    for count in (1, 3, 10):
        k = np.zeros((2, 1, count), np.int64)
        scales = entropy.choose_scales(k, HAND, q)
        flags = [entropy._zero_flag(parts) for parts in entropy._channels(HAND, q, scales)]
        estimate = entropy.cross_entropy(k, HAND, q) - map_bits(scales)
        assert math.isclose(sum(ideal_bits(flag, [1]) for flag in flags), estimate, rel_tol=1e-3, abs_tol=1e-3)
        assert not entropy.decode(entropy.encode(k, HAND, q), HAND, q, k.shape).any()


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
        RangeDecoder(b"").decode(table(5592405, 5592406), 100_000)
    with pytest.raises(ValueError, match="damaged"):            # the code beyond the last interval, which rounding leaves over
        RangeDecoder(b"\xff" * 100).decode(table(5592405, 5592406), 100)
    with pytest.raises(ValueError, match="damaged"):            # an Elias-gamma code of zeros would go on for ever
        entropy.decode_gamma(RangeDecoder(bytes(100)))


def test_decoding_is_integer_arithmetic():
    """Symbols come from integer tables alone: precision and number of threads, which change floats, cannot change them."""
    prior = random_prior()
    tables, k = entropy.freeze(prior, STEPS), some_latent(prior, 1.0)
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
    """Bytes recorded when version 1 of the format was fixed: if this fails, old files no longer decode, so raise the version."""
    k = np.array([[[0, 1, -1, 0], [5, 0, 0, -300]], [[0, 0, 0, 0], [0, 0, 0, 1]]])
    zeros = np.zeros_like(k)
    recorded = {0: "3aae66e06c67a4fb96fb", 1: "3aa734f052ddb4ede8de"}
    for q, text in recorded.items():
        assert entropy.encode(k, HAND, q).hex() == text
        assert (entropy.decode(bytes.fromhex(text), HAND, q, k.shape) == k).all()
    assert entropy.encode(zeros, HAND, 1).hex() == "06"
    assert entropy.encode_map([[4, 4, 5], [3, 3, 7]], 8).hex() == "8b8a"
