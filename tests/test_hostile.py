"""Files that mean harm: thousands of damaged and forged ones, each refused in one line, or decoded to what it says.

The suite tries a few thousand; `python tests/test_hostile.py 100000` tries as many as one likes, and prints how many of which kind.
"""
import contextlib
import io
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import hfd
import sample
import train
from hfd import HFDError

KINDS = ("random bytes", "truncated", "extended", "one bit flipped", "bytes overwritten", "sections swapped", "header forged", "payload forged")


def hostile(kind, rng, real):
    """One file of the given kind. Forged ones carry a checksum that is right and the model's own identity."""
    data = bytearray(real[rng.integers(len(real))])
    start = sample.HEADER_BYTES
    if kind == "random bytes":
        return (sample.MAGIC if rng.random() < 0.5 else b"") + rng.bytes(int(rng.integers(0, 400)))
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
    header = list(sample.HEADER.unpack_from(data))
    payload = bytes(data[start:])
    if kind == "header forged":         # quality, map, width, height, seed: any value that fits its field
        field = int(rng.integers(2, 7))
        header[field] = int(rng.integers(0, 2 ** {2: 8, 3: 8, 4: 16, 5: 16, 6: 32}[field]))
    else:
        payload = rng.bytes(int(rng.integers(0, 2 * len(payload))))
    forged = sample.HEADER.pack(*header)
    return forged + struct.pack(">I", zlib.crc32(forged + payload)) + payload


def attack(model, real, cases, seed=0):
    """Decode `cases` hostile files. Returns a Counter of (kind, outcome); AssertionError on the first that misbehaves."""
    rng, outcomes = np.random.default_rng(seed), Counter()
    pixels = {data: sample.decompress(data, model, rho=0)[0].tobytes() for data in real}
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
                outcome = "unharmed" if data in pixels and image.tobytes() == pixels[data] else "decoded as forged"
                assert "forged" in kind or outcome == "unharmed", f"case {case}, {kind}: a wrong picture without a word"
        except HFDError as error:
            assert len(str(error).splitlines()) == 1
            outcome = "refused"
        seconds = time.perf_counter() - begin
        assert seconds < 2 or outcome != "refused", f"case {case}, {kind}: refused after {seconds:.1f} s"
        outcomes[kind, outcome] += 1
    return outcomes


def real_files(model, photo):
    """Files of several sizes, levels, with and without a map."""
    return [sample.compress(photo.crop((0, 0, w, h)), model, q, seed=5, block=block)[0]
            for w, h, q, block in ((100, 75, 2, 0), (33, 16, 1, 32), (1, 1, 3, 0), (64, 64, 3, 16))]


def test_hostile_files(tiny_model, photo):
    """Whatever is done to a file, it is refused in one line within two seconds, or decodes to exactly what it says."""
    model = hfd.load_model(tiny_model, torch.device("cpu"))
    outcomes = attack(model, real_files(model, photo), 4000)
    assert sum(outcomes.values()) == 4000
    for kind in KINDS[:6]:
        assert outcomes[kind, "refused"] > 480                          # of 500; the others happened to change nothing


def test_info_on_hostile_files(tiny_model, photo, tmp_path):
    """`info` needs no model, and is as unmoved."""
    model = hfd.load_model(tiny_model, torch.device("cpu"))
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
    assert 600 < refused < 800


if __name__ == "__main__":
    torch.manual_seed(0)
    checkpoint = hfd.load_model(sample.MODEL, torch.device("cpu"))
    picture = Image.fromarray(train.dead_leaves(100, np.random.default_rng(0))).crop((0, 0, 100, 75))
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    for (kind, outcome), number in sorted(attack(checkpoint, real_files(checkpoint, picture), count).items()):
        print(f"{kind:20} {outcome:24} {number}")
    print(f"{count} cases, no traceback, no wrong picture, none refused later than 2 s")
