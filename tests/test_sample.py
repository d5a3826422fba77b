"""What sample.py promises: any picture becomes a file, which decodes; all else is refused."""
import errno
import io
import os
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from conftest import contents, memory_within, refusal

import hfd
import sample
from figures import metrics


@pytest.fixture(scope="module")
def data(photo, model):
    """The bytes of a real file."""
    return sample.compress(photo, model, 2, seed=7)[0]


def decode(data, model, **settings):
    """The decoded pixels as integers, after three sampling steps."""
    return np.asarray(sample.decompress(data, model, **({"steps": 3} | settings))[0]).astype(int)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (33, 16), (100, 75), (5000, 10)])
def test_any_size_round_trips(size, photo, model):
    """Cells have 16x16 pixels; sizes that do not fit are continued inside, and cropped on the way
    out. Estimated bits are real ones, within 0.2 % + 2 bytes, and all else is the header."""
    image = photo.crop((0, 0) + size) if size[0] <= 100 else photo.resize(size)
    assert sample.to_image(sample.to_tensor(image, "cpu"), *size) == image
    for quality in (1, 3):
        data, report = sample.compress(image, model, quality)
        estimated, payload, file = (report[part] * size[0] * size[1] / 8
                                    for part in ("estimated", "payload", "file"))
        assert abs(payload - estimated) <= 0.002 * estimated + 2
        assert round(file) == len(data) == round(payload) + sample.HEADER_BYTES
        blurry, _ = sample.decompress(data, model, rho=0)
        assert blurry.size == size and blurry.mode == "RGB" and metrics.psnr(image, blurry) > 13
    assert decode(data, model).shape == (size[1], size[0], 3)


def test_same_input_same_bytes_same_pixels(photo, model, data):
    """The same picture gives the same file, which gives the same pixels. Another seed draws another
    picture of the same latent. rho mixes blurry and sampled."""
    assert sample.compress(photo, model, 2, seed=7)[0] == data
    std = model.diffusion.residual_std[1].square().mean().sqrt().item()
    eta = hfd.RELATIVE_ETA * std                                                    # the default
    ways = {}, {"sampler": "ddpm"}, {"sampler": "ddim"}, {"eta": 2 * eta}
    drawn = [decode(data, model, **way) for way in ways]
    assert all((a == decode(data, model, seed=7, **way)).all() for a, way in zip(drawn, ways))
    assert len({a.tobytes() for a in drawn}) == len(ways)
    assert (decode(data, model, sampler="dpm", eta=eta) == drawn[0]).all()
    assert (decode(data, model, seed=8) != decode(data, model)).any()
    assert (decode(data, model, seed=8, rho=0) == decode(data, model, rho=0)).all()
    blurry, half, full = (decode(data, model, rho=rho) for rho in (0, 0.5, 1))
    assert (full != blurry).any() and np.abs(half - (blurry + full) / 2).max() <= 1


def test_the_header_is_as_documented(photo, data, model):
    """Its fields have fixed places, big-endian; last comes a CRC-32 of all the rest. The mean
    colour brings back a tint that is too faint for coarse steps."""
    mean = np.asarray(photo).mean(axis=(0, 1)).round().astype(np.uint8).tobytes()
    head = b"HFD\x04\x02\x00" + struct.pack(">HH3sI", 100, 75, mean, 7) + model.identity
    assert data[:25] == head + struct.pack(">I", zlib.crc32(head + data[25:]))
    tinted = Image.new("RGB", (40, 24), (129, 128, 126))
    faint, _ = sample.compress(tinted, model, 1)
    assert sample.decompress(faint, model, rho=0)[0] == tinted


def test_the_energy_map_travels_in_the_file(photo, model, data):
    """HFD+ adds a few bytes beside the same latent, which the sampler alone heeds."""
    x, parsed = sample.to_tensor(photo, "cpu"), sample.parse(data, "file")
    k = model.autoencoder.encode(x, 1)
    x_hat = sample.with_mean(model.autoencoder.decode(k, 1), parsed)
    for block, most in ((16, 1 + 5 * 7 // 2), (128, 1)):
        plus, _ = sample.compress(photo, model, 2, seed=7, block=block)
        header = sample.parse(plus, "file")
        assert 1 << plus[5] == block and header["latent"] == parsed["latent"]
        assert int.from_bytes(plus[25:29], "big") == len(header["energy"])
        assert len(plus) == len(data) + 4 + len(header["energy"]) <= len(data) + 4 + most
        sent = hfd.residual_energy(x, x_hat, model.diffusion.residual_std[1:2], block)
        _, arrived = sample.decode_latent(header, model, "file")            # in cells of 16 pixels
        assert (arrived[..., ::block // 16, ::block // 16] == sent).all()
        assert (decode(plus, model) != decode(data, model)).any()
        assert (decode(plus, model, rho=0) == decode(data, model, rho=0)).all()


def test_a_library_refuses_what_it_would_get_wrong(photo, model):
    """Other modes than RGB, too long a side, blocks and levels that no decoder knows are refused,
    not coded as something else."""
    for mode in ("RGBA", "L", "P", "YCbCr", "HSV"):
        assert mode in refusal(sample.compress, photo.convert(mode), model, 2)
    assert "65536x1 " in refusal(sample.compress, Image.new("RGB", (65536, 1)), model, 2)
    for quality, block in ((2, 48), (2, 256), (0, 0), (4, 0)):
        assert "quality" in refusal(sample.compress, photo, model, quality, 0, block)


def write_png(path, width, height, depth, colour, rows):
    """A PNG of any kind, also of those that Pillow only reads. rows: the pixel data, big-endian."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
             (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts))


def white_is_zero(path, image):
    """A TIFF that counts from white to black: one of its tags says so."""
    image.save(path)
    one, zero = (struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0))
    path.write_bytes(path.read_bytes().replace(one, zero))


RED, GREEN, GREY, WHITE = SAME = (255, 0, 0), (0, 255, 0), (128, 128, 128), (255, 255, 255)
FOUR = Image.fromarray(np.reshape(np.uint8(SAME), (2, 2, 3)))                   # 2x2 pixels
CLEAR = Image.merge("RGBA", (*FOUR.split(), Image.fromarray(np.uint8([[0, 51], [255, 255]]))))
GREYS, DEEP = Image.new("L", (2, 2), 128), np.uint16([[0, 257], [32896, 65535]])
DEEP_ROWS = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in DEEP)
TURN, HISTORY = Image.Exif(), PngImagePlugin.PngInfo()
TURN[0x0112] = 6                                            # "turn me by 90 degrees clockwise"
HISTORY.add_itxt("history", "brush " * 350_000, zip=True)
# Colour profiles: sRGB's own by another name; with a gamma of 1, where 128 is half of the light,
# which in sRGB is 188; with red and blue exchanged; and a straight line for grey pictures.
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CURVE, NAMED = SRGB.index(b"para"), SRGB.replace(b"s\0R\0G\0B", b"n\0o\0n\0e")
LINEAR = SRGB[:CURVE + 8] + struct.pack(">HHI", 0, 0, 1 << 16) + SRGB[CURVE + 16:]
SWAPPED = SRGB.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")
LINE = LINEAR.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC")
PICTURES = [    # (name, an image or a function that writes a file, how, the file's pixels, remark)
    ("palette.png", FOUR.quantize(4), {}, SAME, ""),
    ("cmyk.tiff", FOUR.convert("CMYK"), {}, SAME, ""),
    ("grey.png", FOUR.convert("L"), {}, [76, 150, 128, 255], ""),
    ("two.png", FOUR.convert("1", dither=0), {}, [0, 255, 255, 255], ""),
    # What is transparent is laid on white.
    ("alpha.png", CLEAR, {}, [WHITE, (204, 255, 204), GREY, WHITE], "transparency"),
    ("key.png", FOUR, {"transparency": RED}, [WHITE, GREEN, GREY, WHITE], "transparency"),
    # 65535 is white, not 255: Pillow would clip 16-bit grey. It writes no 16-bit colour.
    ("deep.png", Image.fromarray(DEEP), {}, [0, 1, 128, 255], "16 bits"),
    ("deep.png", write_png, {"width": 2, "height": 2, "depth": 16, "colour": 2, "rows": DEEP_ROWS},
     [0, 1, 128, 255], "16 bits"),
    # Pillow heeds this with 8 bits, but not with 16.
    ("zero.tiff", white_is_zero, {"image": FOUR.convert("L")}, [179, 105, 127, 0], ""),
    ("zero.tiff", white_is_zero, {"image": Image.fromarray(DEEP)}, [255, 254, 127, 0], "16 bits"),
    # The codec keeps no notes, so it turns the picture. An editor may keep megabytes of history.
    ("turned.png", FOUR, {"exif": TURN}, [GREY, RED, WHITE, GREEN], ""),
    ("edited.png", FOUR, {"pnginfo": HISTORY}, SAME, ""),
    ("named.png", FOUR, {"icc_profile": NAMED}, SAME, ""),
    ("linear.png", FOUR, {"icc_profile": LINEAR}, [RED, GREEN, (188,) * 3, WHITE], "to sRGB"),
    ("swap.png", FOUR, {"icc_profile": SWAPPED}, [(0, 0, 255), GREEN, GREY, WHITE], "to sRGB"),
    ("line.png", GREYS, {"icc_profile": LINE}, [188] * 4, "to sRGB"),
    ("line.png", GREYS.convert("LA"), {"icc_profile": LINE}, [188] * 4, "to sRGB"),
    # Some programs leave such a profile on a colour picture: its colours are kept.
    ("wrong.png", FOUR, {"icc_profile": LINE}, SAME, "cannot be used"),
    ("broken.png", FOUR, {"icc_profile": b"none"}, SAME, "cannot be used"),
    # Of an animation the first frame is kept. The preview in a phone's picture is no animation.
    ("moving.gif", FOUR, {"save_all": True, "append_images": [CLEAR]}, SAME, "first of 2 frames"),
    ("phone.jpg", GREYS, {"format": "MPO", "save_all": True, "append_images": [GREYS]}, [128] * 4,
     "")]


@pytest.mark.parametrize("name, what, how, pixels, remark", PICTURES)
def test_pictures_of_every_kind(name, what, how, pixels, remark, tmp_path):
    """Any picture becomes 8-bit RGB that looks as it was meant to; what is lost is told."""
    getattr(what, "save", what)(tmp_path / name, **how)
    image, remarks = sample.open_picture(tmp_path / name)
    assert bool(remarks) == bool(remark) and remark in " ".join(remarks)
    off = np.asarray(image).reshape(4, 3) - np.reshape(pixels, (4, -1))
    assert np.abs(off).max() <= (2 if "sRGB" in remark else 0)


def test_what_is_no_picture_is_refused(photo, tmp_path):
    """A text, half a picture, a folder, a program, pixels without a range: one line names it."""
    (tmp_path / "text.png").write_text("not a picture\n" * 20)
    photo.save(tmp_path / "half.png")
    os.truncate(tmp_path / "half.png", 3000)
    photo.convert("F").save(tmp_path / "float.tiff")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path / "deep.tiff")
    (tmp_path / "folder.png").mkdir()
    photo.save(tmp_path / "program.eps")
    for name in (*(path.name for path in tmp_path.iterdir()), "missing.png"):
        assert name in refusal(sample.open_picture, tmp_path / name)


@pytest.mark.parametrize("size", [(12_000, 10_000), (40_000, 40_000), (70_000, 2)])
def test_decompression_bombs_are_refused(size, tmp_path, recwarn):
    """A file of 100 bytes can claim a billion pixels: the size is checked before any is decoded,
    and the refusal is all one sees."""
    write_png(tmp_path / "bomb.png", *size, 8, 2, b"")
    with memory_within(100):
        assert "exceeds" in refusal(sample.open_picture, tmp_path / "bomb.png")
    assert not recwarn.list


def test_the_identity_names_the_autoencoder_only(tiny_model, data, model, tmp_path):
    """A file decodes with the autoencoder that made it; the denoiser may be another, or missing."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")

    def altered(part, name):
        about, arrays = hfd.read_archive(folder / f"{part}.npz")
        arrays[name] += 0.5
        hfd.write_archive(folder / f"{part}.npz", about, arrays)
        return folder
    retrained = hfd.load_model(altered("denoiser", "weights.net.stem.bias"))
    assert (decode(data, retrained) != decode(data, model)).any()
    altered("autoencoder", "weights.offset")
    assert "another autoencoder" in refusal(hfd.load_model, folder)     # than its denoiser's
    (folder / "denoiser.npz").unlink()
    assert "--model" in refusal(sample.decompress, data, hfd.load_model(folder))
    shutil.copy(f"{tiny_model}/autoencoder.npz", folder)
    stage1 = hfd.load_model(folder)
    for one in (retrained, stage1):
        assert (decode(data, one, rho=0) == decode(data, model, rho=0)).all()
    assert "--rho 0" in refusal(sample.decompress, data, stage1)


@pytest.fixture
def desk(tmp_path, photo, data, monkeypatch):
    """A folder with what the commands below need, and the working directory."""
    photo.save(tmp_path / "photo.png")
    wide = data[:6] + struct.pack(">HH", 65535, 1) + data[10:sample.HEADER.size]
    wide += struct.pack(">I", zlib.crc32(wide))             # nothing more, but that is right
    for name, content in {"photo": data, "broken": data[:-1] + b"?", "wide": wide}.items():
        (tmp_path / f"{name}.hfd").write_bytes(content)
    for name in ("taken.png", "taken.hfd"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "dangling.hfd").symlink_to("gone.hfd")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(words):
    """How a command ends: with None, a status, or a line that Python prints before status 1."""
    try:
        sample.run(lambda: sample.main(words))
    except SystemExit as error:
        return error.code


def test_compress_info_decompress(desk, tiny_model, model, data, capsys):
    """The commands in a row print what they did, and files hold what the functions return."""
    def printed(words):
        sample.main(words.split())
        return capsys.readouterr().out
    said = printed(f"compress photo.png new.hfd --seed 7 --model {tiny_model}")
    assert f"{len(data)} bytes" in said and "estimated" in said and "payload" in said
    assert (desk / "new.hfd").read_bytes() == data
    said = printed("info new.hfd")
    assert "100x75" in said and model.identity.hex() in said and str(len(data)) in said
    every = {"steps": 2, "seed": 8, "sampler": "ddpm", "eta": 0.5, "patch": 32, "context": 0}
    for settings in ({"steps": 2}, {"rho": 0}, every):
        flags = " ".join(f"--{name} {value}" for name, value in settings.items())
        printed(f"decompress new.hfd new.png --force --model {tiny_model} {flags}")
        assert (np.asarray(Image.open("new.png")) == decode(data, model, **settings)).all()
    printed(f"compress photo.png plus.hfd --plus --model {tiny_model}")
    assert "map in blocks of 64" in printed("info plus.hfd")


LONG = 252 * "n" + ".png"                                   # one byte more than a name may have
REFUSED = f"""
compress missing.png new.hfd               compress photo.hfd new.hfd
compress photo.png taken.hfd               compress photo.png .
compress photo.png dangling.hfd            compress photo.png dangling.hfd --force
compress photo.png empty --force           compress photo.png newdir/
compress photo.png new.PNG                 compress photo.png nowhere/new.hfd
compress photo.png -                       compress - new.hfd
decompress photo.hfd new.png --eta 0       compress photo.png new.hfd --device meta
compress photo.png new.hfd --model empty   decompress photo.png new.png
decompress broken.hfd taken.png --force    decompress missing.hfd new.png
decompress photo.hfd taken.png             decompress photo.hfd new.xyz
decompress photo.hfd newdir/               decompress photo.hfd {LONG}
decompress photo.hfd -                     decompress photo.hfd new.png --rho nan
decompress wide.hfd new.jpg --model gone   decompress wide.hfd new.webp --model gone
decompress photo.hfd new.png --steps 0     decompress photo.hfd new.png --context -1
info missing.hfd                           info photo.png
info broken.hfd                            info empty"""
REFUSED = [part for part in re.split(r"\n|  +", REFUSED) if part]


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command[:50])
def test_refused_commands_leave_everything_as_it_was(command, desk, tiny_model, capsys):
    """What cannot be done ends in one line and a failure status, and no file is made, changed or
    left half written. An output that cannot be is known before a model has been looked for."""
    before, words = contents(desk), command.split()
    if words[0] != "info" and "--model" not in words:
        words += ["--model", tiny_model]
    line = ended(words)
    assert line.startswith("error: ") and len(line.splitlines()) == 1 and "gone" not in line
    assert contents(desk) == before and capsys.readouterr() == ("", "")


def test_terminals_of_every_kind(desk, monkeypatch, capsys):
    """Names may have letters that a terminal cannot show, or that would steer it: they are spelt
    out. A pipe that closes early, as `| head -1` does, ends a command without a word."""
    os.rename("photo.hfd", "n\u00e9\u0416.hfd")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert ended(["info", "n\u00e9\u0416.hfd"]) is None
    assert sys.stdout.buffer.getvalue().startswith(b"n\\xe9\\u0416.hfd: HFD file")
    assert ended(["info", "a\nb\x1b"]).startswith("error: a\\nb\\x1b")
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    assert ended(["info", "n\u00e9\u0416.hfd"]) == 1 and capsys.readouterr().err == ""


def test_outputs_go_where_they_are_meant_to(desk, data, tiny_model):
    """A link is followed and stays a link; an overwritten file keeps its mode. Writing goes to a
    temporary name first: if it fails half-way, the old file is there, and nothing else is."""
    (desk / "private.hfd").touch(0o600)
    (desk / "link.hfd").symlink_to("private.hfd")
    words = ["compress", "photo.png", "link.hfd", "--seed", "7", "--force", "--model", tiny_model]
    assert ended(words) is None and os.readlink("link.hfd") == "private.hfd"
    assert (desk / "private.hfd").read_bytes() == data
    assert (desk / "private.hfd").stat().st_mode & 0o777 == 0o600
    before = contents(desk)

    def fail(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left" in refusal(hfd.write_atomically, "taken.hfd", fail)
    assert contents(desk) == before
