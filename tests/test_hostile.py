"""Files that mean harm: damaged and forged ones, refused in one line, or decoded to what they say.

The suite tries some of each kind. `HOSTILE=100000 python -m pytest -s tests/test_hostile.py` tries
so many .hfd files, and a tenth as many models, and prints what became of them."""
import os
import shutil
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
from conftest import memory_within

import hfd
import sample
from hfd import HFDError

CASES = int(os.environ.get("HOSTILE", 1500))
DAMAGE = ("random bytes", "truncated", "extended", "one bit flipped", "bytes overwritten",
          "sections swapped")
FORGERY = "header forged", "payload forged", "payload damaged"


def damaged(kind, rng, data):
    """The bytes `data` after an accident of that kind."""
    data, at = bytearray(data), int(rng.integers(len(data)))
    if kind == "random bytes":              # half of them start as the file does
        return bytes(data[:4] if rng.random() < 0.5 else b"") + rng.bytes(int(rng.integers(400)))
    if kind == "extended":
        data += rng.bytes(int(rng.integers(1, 50)))
    elif kind == "one bit flipped":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "bytes overwritten":
        data[at:at + 8] = rng.bytes(len(data[at:at + 8]))
    elif kind == "sections swapped":
        data = data[at:] + data[:at]
    return bytes(data[:at] if kind == "truncated" else data)


def forged(kind, rng, data):
    """An .hfd file made to deceive: its checksum is right, and the identity is the model's own."""
    header, payload = bytearray(data[:sample.HEADER.size]), data[sample.HEADER_BYTES:]
    if kind == "header forged":             # any value, after magic and version, before identity
        header[rng.integers(4, sample.HEADER.size - 4)] = int(rng.integers(256))
    elif kind == "payload forged":
        payload = rng.bytes(int(rng.integers(2 * len(payload) + 1)))
    else:                                   # true up to some place
        at = int(rng.integers(len(payload)))
        strange = (b"", rng.bytes(1), rng.bytes(8))[rng.integers(3)]
        payload = payload[:at] + strange + payload[at + int(rng.integers(3)):]
    return bytes(header) + struct.pack(">I", zlib.crc32(bytes(header) + payload)) + payload


def report(outcomes, capsys):
    """Print what became of all, if somebody asked for it."""
    if "HOSTILE" in os.environ:
        with capsys.disabled():
            for (kind, outcome), number in sorted(outcomes.items()):
                print(f"\n{kind:20} {outcome:24} {number}", end="")


def test_hostile_files(model, photo, capsys):
    """Whatever is done to a file, it is refused in one line, in two seconds and 500 MB, or decodes
    to the size that it says. No accident goes unnoticed, so none makes a wrong picture."""
    rng, outcomes = np.random.default_rng(0), Counter()
    real = [sample.compress(photo.crop((0, 0, w, h)), model, q, seed=5, block=block)[0]
            for w, h, q, block in ((100, 75, 2, 0), (33, 16, 1, 32), (1, 1, 3, 0), (64, 64, 3, 16))]
    with memory_within(500):
        for case in range(CASES):
            kind, data = (*DAMAGE, *FORGERY)[case % 9], real[rng.integers(len(real))]
            data = (damaged if kind in DAMAGE else forged)(kind, rng, data)
            begin = time.process_time()
            try:
                header = sample.parse(data, "hostile.hfd")
                size, outcome = (header["width"], header["height"]), "decoded as forged"
                if size[0] * size[1] > 10 ** 6:             # else it is a picture of that size
                    sample.decode_latent(header, model, "hostile.hfd")
                    outcomes[kind, "a large picture"] += 1
                    continue
                settings = {"rho": 0} if case % 4 else {"steps": 1}
                assert sample.decompress(data, model, "hostile.hfd", **settings)[0].size == size
                assert kind in FORGERY or data in real, f"case {case}, {kind}: unnoticed"
                outcome = "unharmed" if data in real else outcome
            except HFDError as error:
                assert len(str(error).splitlines()) == 1
                outcome = "refused"
            assert time.process_time() - begin < 2, f"case {case}, {kind}: {outcome}, but slowly"
            outcomes[kind, outcome] += 1
    assert all(outcomes[kind, "refused"] > 0.95 * (CASES // 9) for kind in DAMAGE)
    report(outcomes, capsys)


def test_a_large_file_of_rubbish_is_refused_at_once(tmp_path):
    """As large as a file may be, and hollow: refused without holding it twice."""
    (tmp_path / "large.hfd").write_bytes(sample.MAGIC + bytes([sample.VERSION]))
    os.truncate(tmp_path / "large.hfd", 4 * sample.MAX_PIXELS)
    with memory_within(500), pytest.raises(HFDError, match="large.hfd: damaged"):
        sample.main(["info", str(tmp_path / "large.hfd")])


STRANGE = (0, -1, 10 ** 12, 10 ** 600, 1e400, float("nan"), 0.5, True, None, "x", [], {}, [[8]],
           [8] * 99, [10 ** 9] * 4)


def forge(rng, about, arrays):
    """Change one thing in a part of a model, at random. Returns its text and arrays."""
    about, arrays = about | {"config": dict(about["config"])}, dict(arrays)
    name, other = rng.choice(sorted(arrays), 2)
    kind = rng.choice(("text", "config", "config", "missing", "array", "array", "pickle"))
    if kind in ("text", "config"):
        of = about if kind == "text" else about["config"]
        of[rng.choice(sorted(of))] = STRANGE[rng.integers(len(STRANGE))]
    elif kind == "missing":
        del arrays[name]
    elif kind == "pickle":                  # code would hide in such an array; nobody unpacks it
        arrays[name] = np.array([{"code": os.system}], object)
    else:
        a = arrays[name]
        arrays[name] = (arrays[other], a.ravel(), a.astype("float64"), a.astype("U8"), a * 0 - 1,
                        np.full_like(a, 30_000), a[:0] if a.ndim else a)[rng.integers(7)]
    return about, arrays


def test_hostile_models(tiny_model, model, photo, tmp_path, capsys):
    """A damaged model is refused in one line, or what was damaged matters to nobody. So is a forged
    one, in two seconds and 500 MB; or it loads, and codes a picture, or says that it cannot."""
    shutil.copytree(tiny_model, tmp_path / "model")
    paths = [tmp_path / "model" / f"{part}.npz" for part in ("autoencoder", "denoiser")]
    whole, contents = [path.read_bytes() for path in paths], [hfd.read_archive(p) for p in paths]
    rng, outcomes, small = np.random.default_rng(0), Counter(), photo.crop((0, 0, 20, 20))

    def there_and_back(model):
        return sample.decompress(sample.compress(small, model, 1)[0], model, steps=1)[0]
    expected = there_and_back(model)
    with memory_within(500):
        for case in range(CASES // 10):
            part, kind = case % 2, (*DAMAGE, *["forged"] * 6)[case // 2 % 12]
            begin = time.process_time()
            if kind == "forged":
                hfd.write_archive(paths[part], *forge(rng, *contents[part]))
            else:
                paths[part].write_bytes(damaged(kind, rng, whole[part]))
            try:
                decoded = there_and_back(hfd.load_model(tmp_path / "model"))
                assert kind == "forged" or decoded == expected, f"case {case}, {kind}: unnoticed"
                outcome = "unharmed" if decoded == expected else "works as forged"
            except HFDError as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
                outcome = "refused"
            assert time.process_time() - begin < 2, f"case {case}, {kind}: {outcome}, but slowly"
            outcomes[kind, outcome] += 1
            paths[part].write_bytes(whole[part])
    assert outcomes["forged", "refused"] > 0.5 * (CASES // 20)
    report(outcomes, capsys)
