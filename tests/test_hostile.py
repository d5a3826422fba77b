"""Files that mean harm: thousands of damaged and forged ones, each refused in one line, or decoded to what it says.

The suite tries a few thousand; `HOSTILE=100000 python -m pytest -s tests/test_hostile.py` as many as one likes. It prints what became of them.
"""
import contextlib
import io
import os
import time
from collections import Counter

import numpy as np
import pytest
from conftest import memory_within, sealed

import sample
from hfd import HFDError

CASES = int(os.environ.get("HOSTILE", 4000))
KINDS = ("random bytes", "truncated", "extended", "one bit flipped", "bytes overwritten", "sections swapped", "header forged", "payload forged", "payload damaged")


def hostile(kind, rng, real):
    """One file of the given kind. The last three carry a checksum that is right and the model's own identity."""
    data = bytearray(real[rng.integers(len(real))])
    if kind == "random bytes":          # half of them start as our files do
        return (sample.MAGIC + bytes([sample.VERSION]) if rng.random() < 0.5 else b"") + rng.bytes(int(rng.integers(0, 400)))
    if kind == "truncated":
        return bytes(data[:rng.integers(len(data))])
    if kind == "extended":
        return bytes(data) + rng.bytes(int(rng.integers(1, 50)))
    if kind == "one bit flipped":
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        return bytes(data)
    if kind == "bytes overwritten":
        at = int(rng.integers(len(data)))
        data[at:at + 8] = rng.bytes(len(data[at:at + 8]))
        return bytes(data)
    if kind == "sections swapped":
        a, b = sorted(rng.integers(0, len(data), 2))
        return bytes(data[b:] + data[a:b] + data[:a])
    names = "magic", "version", "quality", "block", "width", "height", "seed", "identity"
    header, payload = dict(zip(names, sample.HEADER.unpack_from(data))), bytes(data[sample.HEADER_BYTES:])
    del header["magic"]
    if kind == "header forged":         # any value that fits its field
        bits = {"quality": 8, "block": 8, "width": 16, "height": 16, "seed": 32}
        field = list(bits)[rng.integers(len(bits))]
        header[field] = int(rng.integers(2 ** bits[field]))
    elif kind == "payload forged":
        payload = rng.bytes(int(rng.integers(0, 2 * len(payload))))
    else:                               # true up to some place
        at = int(rng.integers(len(payload)))
        payload = payload[:at] + (b"", rng.bytes(1), rng.bytes(8))[rng.integers(3)] + payload[at + int(rng.integers(3)):]
    return sealed(payload, **header)


def attack(model, real, cases, seed=0):
    """Decode `cases` hostile files. Returns a Counter of (kind, outcome); AssertionError on the first that misbehaves."""
    rng, outcomes = np.random.default_rng(seed), Counter()
    essence = lambda data: data[4:10] + data[sample.HEADER_BYTES:]          # all that the autoencoder's picture depends on: not the seed
    pictures = {essence(data): sample.decompress(data, model, rho=0)[0].tobytes() for data in real}
    for case in range(cases):
        kind = KINDS[case % len(KINDS)]
        data, begin = hostile(kind, rng, real), time.perf_counter()
        try:
            header = sample.parse(data, "hostile.hfd")
            if header["width"] * header["height"] > 10 ** 6:
                sample.decode_latent(header, model, "hostile.hfd")      # enough to be refused; else it is a picture of that size
                outcome = "large, latent decoded"
            else:
                image, _ = sample.decompress(data, model, "hostile.hfd", rho=0)
                assert image.size == (header["width"], header["height"])
                outcome = "unharmed" if data in real else "decoded as forged"
                assert kind in KINDS[6:] or outcome == "unharmed", f"case {case}, {kind}: damage went unnoticed"
                assert image.tobytes() == pictures.get(essence(data), image.tobytes()), f"case {case}, {kind}: a wrong picture without a word"
                if case % 4 == 0:       # and sampled
                    sample.decompress(data, model, "hostile.hfd", steps=1)
        except HFDError as error:
            assert len(str(error).splitlines()) == 1
            outcome = "refused"
        seconds = time.perf_counter() - begin
        assert seconds < 2 or outcome == "large, latent decoded", f"case {case}, {kind}: {outcome} after {seconds:.1f} s"
        outcomes[kind, outcome] += 1
    return outcomes


def real_files(model, photo):
    """Files of several sizes, levels, with and without a map."""
    return [sample.compress(photo.crop((0, 0, w, h)), model, q, seed=5, block=block)[0]
            for w, h, q, block in ((100, 75, 2, 0), (33, 16, 1, 32), (1, 1, 3, 0), (64, 64, 3, 16))]


def test_hostile_files(model, photo, capsys):
    """Whatever is done to a file, it is refused in one line, in two seconds and 500 MB, or decodes to exactly what it says."""
    with memory_within(500):
        outcomes = attack(model, real_files(model, photo), CASES)
    assert sum(outcomes.values()) == CASES
    for kind in KINDS[:6]:
        assert outcomes[kind, "refused"] > 0.95 * CASES / len(KINDS)    # the others happened to change nothing
    if "HOSTILE" in os.environ:
        with capsys.disabled():
            for (kind, outcome), number in sorted(outcomes.items()):
                print(f"\n{kind:20} {outcome:24} {number}", end="")


def test_a_large_file_of_rubbish_is_refused_at_once(tmp_path):
    """As large as a file may be, and hollow: refused without holding it twice."""
    (tmp_path / "large.hfd").write_bytes(sample.MAGIC + bytes([sample.VERSION]))
    os.truncate(tmp_path / "large.hfd", 4 * sample.MAX_PIXELS)
    with memory_within(500), pytest.raises(HFDError) as caught:
        sample.main(["info", str(tmp_path / "large.hfd")])
    assert "large.hfd: damaged" in str(caught.value)


def test_info_on_hostile_files(model, photo, tmp_path):
    """`info` needs no model, and is as unmoved."""
    rng, real, path = np.random.default_rng(1), real_files(model, photo), tmp_path / "hostile.hfd"
    refused = 0
    for case in range(800):
        path.write_bytes(hostile(KINDS[case % len(KINDS)], rng, real))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                sample.main(["info", str(path)])
        except HFDError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and "hostile.hfd" in str(error)
    assert 500 < refused < 800         # two thirds, and what is forged badly
