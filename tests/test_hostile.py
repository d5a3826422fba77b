"""Files that mean harm: damaged and forged ones, refused in one line, or decoded to what they say.

`HOSTILE=100000 python -m pytest -s tests/test_hostile.py` tries so many .hfd files, and a tenth as
many models, and prints what became of them."""
import os
import shutil
import struct
import time
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
from conftest import memory_within, refusal

import hfd
import sample
from hfd import HFDError

CASES = int(os.environ.get("HOSTILE", 1500))
DAMAGE = {                  # what an accident makes of the bytes `data`; at: a random place in them
    "random bytes": lambda data, at, rng: data[:at % 5] + rng.bytes(at),
    "truncated": lambda data, at, rng: data[:at],
    "extended": lambda data, at, rng: data + rng.bytes(1 + at % 50),
    "one bit flipped": lambda data, at, rng: (
        data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1:]),
    "bytes overwritten": lambda data, at, rng: data[:at] + rng.bytes(8) + data[at + 8:],
    "sections swapped": lambda data, at, rng: data[at:] + data[:at]}
FORGERY = "header forged", "payload forged", "payload damaged"


def forged(kind, rng, data):
    """An .hfd file made to deceive: its checksum is right, and the identity is the model's own."""
    header, payload = bytearray(data[:sample.HEADER.size]), data[sample.HEADER_BYTES:]
    if kind == "header forged":             # any value, from the version to before the identity
        header[rng.integers(3, sample.HEADER.size - 4)] = int(rng.integers(256))
    elif kind == "payload forged":
        payload = rng.bytes(int(rng.integers(2 * len(payload) + 1)))
    else:                                   # true up to some place
        at = int(rng.integers(len(payload)))
        strange = (b"", rng.bytes(1), rng.bytes(8))[rng.integers(3)]
        payload = payload[:at] + strange + payload[at + int(rng.integers(3)):]
    return bytes(header) + struct.pack(">I", zlib.crc32(bytes(header) + payload)) + payload


def outcome(function, case):
    """What a function returns, or None if it refuses in one line; either way, in two seconds."""
    begin, result = time.process_time(), None
    try:
        result = function()
    except HFDError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 400, case
    assert time.process_time() - begin < 2, case
    return result


def test_hostile_files(model, photo):
    """Whatever is done to a file, it is refused in one line, in two seconds and 500 MB, or decodes
    to the size that it says. No accident goes unnoticed, so none makes a wrong picture."""
    rng, outcomes = np.random.default_rng(0), Counter()
    real = [sample.compress(photo.crop((0, 0, w, h)), model, q, seed=5, block=block)[0]
            for w, h, q, block in ((100, 75, 2, 0), (33, 16, 1, 32), (1, 1, 3, 0), (64, 64, 3, 16))]

    def decoded():
        header = sample.parse(data, "hostile.hfd")
        size = header["width"], header["height"]
        if size[0] * size[1] > 10 ** 6:                     # else it is a picture of that size
            sample.decode_latent(header, model, "hostile.hfd")
            return "a large picture"
        settings = {"rho": 0} if case % 4 else {"steps": 1}
        assert sample.decompress(data, model, "hostile.hfd", **settings)[0].size == size
        return "unharmed" if data in real else "decoded"
    with memory_within(500):
        for case in range(CASES):
            kind, data = (*DAMAGE, *FORGERY)[case % 9], real[rng.integers(len(real))]
            at = int(rng.integers(len(data)))
            data = DAMAGE[kind](data, at, rng) if kind in DAMAGE else forged(kind, rng, data)
            outcomes[kind, outcome(decoded, case) or "refused"] += 1
    print(*outcomes.items(), sep="\n")
    assert {what for kind, what in outcomes if kind in DAMAGE} <= {"refused", "unharmed"}
    assert all(outcomes[kind, "refused"] > 0.95 * (CASES // 9) for kind in DAMAGE)


STRANGE = (0, -1, 10 ** 12, 10 ** 600, 1e400, float("nan"), 0.5, True, None, "x", [], {}, [[8]],
           [8] * 99, [10 ** 9] * 4, "plain", "factorized")


def forge(rng, about, arrays):
    """Change one thing in a part of a model, at random. Returns its text and arrays."""
    about, arrays = about | {"config": dict(about["config"])}, dict(arrays)
    name, other = rng.choice(sorted(arrays), 2)
    kind = rng.choice(("text", "text", "missing", "array", "array"))
    if kind == "text":
        of = about["config"] if rng.random() < 0.7 else about
        of[rng.choice(sorted(of))] = STRANGE[rng.integers(len(STRANGE))]
    elif kind == "missing":
        del arrays[name]
    else:
        a = arrays[name]
        arrays[name] = (arrays[other], a.ravel(), a.astype("float64"), a.astype("U8"), a * 0 - 1,
                        np.full_like(a, 30_000), a[:0] if a.ndim else a)[rng.integers(7)]
    return about, arrays


def test_hostile_models(tiny_model, model, photo, tmp_path):
    """A damaged model is refused in one line, or what was damaged matters to nobody. So is a forged
    one; or it loads, and codes a picture, or says that it cannot."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    paths = [folder / f"{part}.npz" for part in ("autoencoder", "denoiser")]
    whole, contents = [path.read_bytes() for path in paths], [hfd.read_archive(p) for p in paths]
    rng, outcomes, small = np.random.default_rng(0), Counter(), photo.crop((0, 0, 20, 20))

    def there_and_back(model):
        return sample.decompress(sample.compress(small, model, 1)[0], model, steps=1)[0]
    expected = there_and_back(model)
    with memory_within(500):
        for case in range(CASES // 10):
            part, kind = case % 2, (*DAMAGE, *["forged"] * 6)[case // 2 % 12]
            if kind == "forged":
                hfd.write_archive(paths[part], *forge(rng, *contents[part]))
            else:
                at = int(rng.integers(len(whole[part])))
                paths[part].write_bytes(DAMAGE[kind](whole[part], at, rng))
            found = outcome(lambda: there_and_back(hfd.load_model(folder)), case)
            outcomes[kind, "refused" if found is None else found == expected] += 1
            paths[part].write_bytes(whole[part])
    print(*outcomes.items(), sep="\n")
    assert not any(what is False and kind in DAMAGE for kind, what in outcomes)
    assert outcomes["forged", "refused"] > 0.5 * (CASES // 20)


@pytest.mark.parametrize("size", [(2, (8,), (1,)), (3, (8,) * 5, (0,) * 5)])
def test_a_denoiser_that_does_not_fit_is_refused(size, tiny_model, model, tmp_path):
    """One for fewer quality levels, and one that halves the resolution too often for our pictures:
    each could be a network. That it fits no autoencoder is told when it is loaded."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    network = hfd.DiffusionPlus(hfd.DiffusionConfig(*size))
    hfd.save_part(folder / "denoiser.npz", network, {}, autoencoder=model.identity.hex())
    assert "denoiser.npz: cannot be used" in refusal(hfd.load_model, folder)


def test_what_is_no_archive_is_refused(tmp_path):
    """Nothing at all, a pickle that would run code (and does not), a compressed bomb, a header that
    claims a terabyte: one line each."""
    class Trap:
        def __reduce__(self):                               # what unpickling would call
            return os.mkdir, (str(tmp_path / "sprung"),)
    path = tmp_path / "autoencoder.npz"
    assert "no such file" in refusal(hfd.load_model, tmp_path)
    np.savez(path, json=np.array([Trap()], object))
    assert str(path) in refusal(hfd.load_model, tmp_path) and not (tmp_path / "sprung").exists()
    np.savez_compressed(path, json=np.zeros(2 * 10 ** 8, np.uint8))
    with memory_within(100):
        assert path.stat().st_size < 10 ** 6 and str(path) in refusal(hfd.load_model, tmp_path)
    with zipfile.ZipFile(path, "w") as archive, archive.open("json.npy", "w") as f:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10 ** 12,)}
        np.lib.format.write_array_header_1_0(f, header)
    assert str(path) in refusal(hfd.load_model, tmp_path)
