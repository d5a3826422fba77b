"""What sample.py promises: any picture becomes a small file, the file always decodes alike, and anything else is refused in one line."""
import copy
import errno
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from conftest import memory_within, sealed

import entropy
import hfd
import sample
from hfd import HFDError

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(photo, model):
    """The bytes of a real file."""
    return sample.compress(photo, model, 2, seed=7)[0]


@pytest.fixture(scope="module")
def small(photo, model):
    """The bytes of a real file so small that every truncation and every bit flip of it can be tried."""
    return sample.compress(photo.crop((0, 0, 33, 16)), model, 2)[0]


def decode(data, model, **settings):
    """The decoded pixels as integers, after two sampling steps."""
    return np.asarray(sample.decompress(data, model, **({"steps": 2} | settings))[0]).astype(int)


def refusal(function, *arguments):
    """The text with which a call is refused: an HFDError of one line that says something."""
    with pytest.raises(HFDError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert len(text) > 10 and len(text.splitlines()) == 1
    return text


def altered(tiny_model, path, change):
    """Save a copy of the tiny checkpoint after change(its dictionary), with a digest that is right. Returns the new path."""
    packed = torch.load(tiny_model, weights_only=True)
    change(packed)
    packed["digest"] = hfd.fingerprint(packed["tables"], packed["autoencoder"]["weights"], packed["diffusion"]["weights"])
    torch.save(packed, path)
    return str(path)


def write_png(path, width, height, depth, colour, rows, transparent=None):
    """A PNG of any kind, also of those that Pillow reads but does not write. rows: the pixel data, big-endian; transparent: bytes of the
    colour that is."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"") +
                     chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


# ------------------------------------------------------------------------------------------------------
# There and back
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (33, 16), (16, 16), (3, 75), (100, 75), (20_000, 10)])
def test_any_size_round_trips(size, photo, model):
    """The transform works in cells of 16x16; sizes that do not fit are continued inside, and cropped again on the way out. Estimated
    bits are real ones: the payload lies within 0.2 % + 16 bytes of them, and the file is exactly one header longer."""
    image = photo.crop((0, 0) + size)
    for quality in (1, 2, 3):
        data, report = sample.compress(image, model, quality)
        estimated, payload, file = (report[key] * size[0] * size[1] / 8 for key in ("estimated", "payload", "file"))
        assert abs(payload - estimated) <= 0.002 * estimated + 16 and round(file) == len(data) == round(payload) + sample.HEADER_BYTES
        blurry, _ = sample.decompress(data, model, rho=0)
        assert blurry.size == size and blurry.mode == "RGB" and sample.psnr(image, blurry) > 13
        assert decode(data, model).shape == (size[1], size[0], 3)


def test_quality_buys_bits_for_error(photo, model):
    """One model spans the curve: each quality level makes a larger file and a smaller error."""
    files = [sample.compress(photo, model, q)[0] for q in (1, 2, 3)]
    errors = [-sample.psnr(photo, sample.decompress(f, model, rho=0)[0]) for f in files]
    assert sorted(map(len, files)) == list(map(len, files)) and sorted(errors, reverse=True) == errors


def test_same_input_same_bytes_same_pixels(photo, model, data):
    """Nothing is left to chance: the same picture gives the same file, which gives the same pixels. The seed in the file is the default;
    another one draws another picture of the same latent."""
    assert sample.compress(photo, model, 2, seed=7)[0] == data
    for sampler in ("ddim", "ddpm"):
        assert (decode(data, model, sampler=sampler) == decode(data, model, sampler=sampler, seed=7)).all()
    assert (decode(data, model, seed=8) != decode(data, model)).any()
    assert (decode(data, model, seed=8, rho=0) == decode(data, model, rho=0)).all()


def test_rho_mixes_the_two_pictures(model, data):
    """rho 0 is exactly the autoencoder's picture, rho 1 the full sample, and 0.5 lies half-way between, pixel by pixel."""
    k, _ = sample.decode_latent(sample.parse(data, "file"), model, "file")
    x_hat = np.asarray(sample.to_image(model.autoencoder.decode(k, 1), 100, 75)).astype(int)
    blurry, half, full = (decode(data, model, rho=rho) for rho in (0, 0.5, 1))
    assert (blurry == x_hat).all() and (full != x_hat).any()
    assert (half >= np.minimum(blurry, full)).all() and (half <= np.maximum(blurry, full)).all()
    assert np.abs(half - (blurry + full) / 2).max() <= 1


def test_the_header_is_as_documented(data, model):
    """Anyone can read the header with the table at the top of sample.py: fixed places, big-endian, a CRC-32 of all the rest."""
    number = lambda first, last: int.from_bytes(data[first:last + 1], "big")
    assert data[:3] == b"HFD" and data[3:6] == bytes([sample.VERSION, 2, 0]) and sample.HEADER_BYTES == 22
    assert (number(6, 7), number(8, 9), number(10, 13), data[14:18]) == (100, 75, 7, model.identity)
    assert number(18, 21) == zlib.crc32(data[:18] + data[22:])


def test_the_energy_map_travels_in_the_file(photo, model, data):
    """HFD+ adds a few bytes beside the same latent: the sampler heeds them, the autoencoder's picture does not change."""
    for block, cells in ((16, (5, 7)), (32, (3, 4)), (128, (1, 1))):
        plus, _ = sample.compress(photo, model, 2, seed=7, block=block)
        header = sample.parse(plus, "file")
        assert header["payload"] == sample.parse(data, "file")["payload"] and header["block"] == block
        assert len(plus) == len(data) + 4 + len(header["energy"]) <= len(data) + 4 + 1 + cells[0] * cells[1] // 2
        energy = sample.decode_latent(header, model, "file")[1]
        x = sample.to_tensor(photo, "cpu")
        blurry = model.autoencoder.decode(model.autoencoder.encode(x, 1), 1)
        sent = hfd.residual_energy(x, blurry, model.diffusion.residual_std[1:2], block)
        assert tuple(sent.shape[2:]) == cells and tuple(energy.shape[2:]) == (5, 7)     # in blocks, and in cells of 16
        assert (energy == sent.repeat_interleave(block // 16, 2).repeat_interleave(block // 16, 3)[..., :5, :7]).all()
        assert (decode(plus, model) != decode(data, model)).any()
        assert (decode(plus, model, rho=0) == decode(data, model, rho=0)).all()


def test_the_largest_file_that_fits(photo):
    """The demo compares at equal bytes: the best JPEG that fits, with no better one that fits, and where none does the smallest there is."""
    jpeg, quality = sample.largest_within(1500, photo)
    buffer = io.BytesIO()
    photo.save(buffer, "jpeg", quality=quality + 1)
    assert len(jpeg) <= 1500 < len(buffer.getvalue()) and quality > 1
    assert sample.largest_within(10, photo)[1] == 1


# ------------------------------------------------------------------------------------------------------
# Pictures of every kind
# ------------------------------------------------------------------------------------------------------


def test_plain_kinds_lose_nothing(photo, tmp_path):
    """Grey, palette, black-and-white and CMYK pictures become RGB, and there is nothing to remark on."""
    for mode, ending in (("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("RGB", "bmp")):
        photo.convert(mode).save(tmp_path / f"kind.{ending}")
        image, remarks = sample.open_picture(tmp_path / f"kind.{ending}")
        assert image.mode == "RGB" and image.size == photo.size and remarks == []
        assert sample.psnr(image, photo.convert(mode).convert("RGB")) > 25


def test_transparency_is_laid_on_white(tmp_path):
    """Three channels have no room for a fourth: what is transparent becomes white, and a remark says so."""
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 0, 0, 0))
    red.putpixel((1, 0), (255, 0, 0, 51))
    red.save(tmp_path / "alpha.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("alpha.png", "palette.png"):
        image, remarks = sample.open_picture(tmp_path / name)
        assert len(remarks) == 1 and "transparency" in remarks[0]
        assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((3, 3)) == (255, 0, 0)
    assert sample.open_picture(tmp_path / "alpha.png")[0].getpixel((1, 0)) == (255, 204, 204)


def test_deep_ppm_is_told(tmp_path):
    """PPM tells its depth as its largest value; more than 255 loses bits here, and a remark says so."""
    for most, told in ((255, 0), (1023, 1), (65535, 1)):
        for content in (b"P6 4 4 %d\n" % most + bytes(48 * (1 + (most > 255))), b"P3 4 4 %d\n" % most + b"0 " * 48):
            (tmp_path / "deep.ppm").write_bytes(content)
            assert len(sample.open_picture(tmp_path / "deep.ppm")[1]) == told


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3)])
def test_sixteen_bits_are_scaled_not_clipped(colour, channels, tmp_path):
    """65535 is white, not 255: Pillow would clip 16-bit grey at 255, so we divide by 257, and say that bits were dropped."""
    values = np.array([0, 257, 25700, 32896, 65535], ">u2")
    write_png(tmp_path / "deep.png", 5, 1, 16, colour, b"\0" + values.repeat(channels).tobytes())
    image, remarks = sample.open_picture(tmp_path / "deep.png")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 100, 128, 255]
    assert len(remarks) == 1 and "16 bits" in remarks[0]
    write_png(tmp_path / "key.png", 5, 1, 16, colour, b"\0" + values.repeat(channels).tobytes(), b"\1\1" * channels)
    assert "transparent" in refusal(sample.open_picture, tmp_path / "key.png")      # 257 alone; in 8 bits it cannot be told from 256


def test_exif_rotation_is_applied(photo, tmp_path):
    """A camera held upright stores a lying picture and a note to turn it; the codec keeps no notes, so it turns the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6                                            # "turn by 90 degrees clockwise to look at me"
    photo.save(tmp_path / "turned.png", exif=exif)
    image, _ = sample.open_picture(tmp_path / "turned.png")
    assert image.size == (75, 100) and sample.psnr(image, photo.transpose(Image.ROTATE_270)) == float("inf")


def test_colour_profiles_are_honoured(photo, tmp_path):
    """A picture in another colour space than sRGB, as phones make them, is converted; sRGB itself passes untouched, by whatever name; a broken
    profile is told."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")    # the red and the blue primary exchanged
    curve = srgb.index(b"para")
    linear = srgb[:curve + 8] + struct.pack(">HHI", 0, 0, 1 << 16) + srgb[curve + 16:]              # still called sRGB, with a gamma of 1
    for name, profile in (("srgb", srgb), ("other_name", srgb.replace(b"s\0R\0G\0B", b"n\0o\0n\0e")), ("swapped", swapped), ("linear", linear),
                          ("broken", b"no profile")):
        photo.save(tmp_path / f"{name}.png", icc_profile=profile)
    for name in ("srgb", "other_name"):
        image, remarks = sample.open_picture(str(tmp_path / f"{name}.png"))
        assert (np.asarray(image) == np.asarray(photo)).all() and not remarks
    image, remarks = sample.open_picture(str(tmp_path / "linear.png"))
    assert "converted to sRGB" in remarks[0] and np.asarray(image).mean() > np.asarray(photo).mean() + 20
    image, remarks = sample.open_picture(str(tmp_path / "swapped.png"))
    assert "converted to sRGB" in remarks[0]
    assert np.abs(np.asarray(image, int) - np.asarray(photo, int)[..., ::-1]).max() <= 2
    image, remarks = sample.open_picture(str(tmp_path / "broken.png"))
    assert (np.asarray(image) == np.asarray(photo)).all() and "cannot be used" in remarks[0]


def test_grey_profiles_are_honoured(tmp_path):
    """Photoshop gives grey pictures a profile of one curve. Here it is a straight line: half of the light is 188 in sRGB, whatever 128 else means."""
    white, curve, at = b"XYZ " + struct.pack(">4i", 0, 63190, 65536, 54061), b"curv" + bytes(8), 128 + 28
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", at, 20, b"kTRC", at + 20, 12) + white + curve
    head = struct.pack(">IIIIII", at + 32, 0, 0x02100000, *(int.from_bytes(word, "big") for word in (b"mntr", b"GRAY", b"XYZ "))).ljust(36, b"\0") + b"acsp"
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png", icc_profile=(head.ljust(68, b"\0") + white[8:]).ljust(128, b"\0") + tags)
    image, remarks = sample.open_picture(tmp_path / "grey.png")
    assert image.getpixel((0, 0)) == (188, 188, 188) and remarks == ["colours are converted to sRGB"]


def test_of_an_animation_the_first_frame_is_kept(tmp_path):
    """A codec for still pictures takes the first frame, and says how many there were."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image, remarks = sample.open_picture(tmp_path / "moving.gif")
    assert image.getpixel((4, 4)) == (255, 0, 0) and remarks == ["only the first of 3 frames is kept"]


def test_what_is_no_picture_is_refused(photo, tmp_path):
    """Not a picture, an empty or half a picture, a folder, no file, one without a fixed range: refused in one line that names it."""
    (tmp_path / "text.png").write_text("not a picture\n" * 20)
    (tmp_path / "empty.png").write_bytes(b"")
    photo.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    photo.convert("F").save(tmp_path / "float.tiff")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path / "deep.tiff")
    (tmp_path / "folder.png").mkdir()
    photo.save(tmp_path / "program.eps")
    for name in ("text.png", "empty.png", "half.png", "float.tiff", "deep.tiff", "folder.png", "program.eps", "missing.png"):
        assert name in refusal(sample.open_picture, tmp_path / name)


@pytest.mark.parametrize("size", [(12_000, 10_000), (40_000, 40_000), (70_000, 2)])
def test_decompression_bombs_are_refused(size, tmp_path, recwarn):
    """A file of 100 bytes can claim a billion pixels: the size is checked before any is decoded, and the refusal is all one sees."""
    write_png(tmp_path / "bomb.png", *size, 8, 2, bytes(size[1] * (3 * size[0] + 1)) if min(size) < 10 else b"")
    hidden = (tmp_path / "bomb.png").read_bytes()               # an icon of 16x16 pixels, it says, with this in it
    (tmp_path / "bomb.ico").write_bytes(struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(hidden), 22) + hidden)
    for name in ("bomb.png", "bomb.ico"):
        with memory_within(100):
            assert name in (text := refusal(sample.open_picture, tmp_path / name)) and "too large" in text
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------
# Files that must be refused
# ------------------------------------------------------------------------------------------------------


def test_all_damage_is_noticed(small, model):
    """Cut off anywhere, one byte too many, any single bit wrong: a CRC-32 notices, and no wrong picture comes out."""
    flipped = [bytes(byte ^ (1 << bit % 8 if i == bit // 8 else 0) for i, byte in enumerate(small)) for bit in range(8 * len(small))]
    for damaged in [small[:n] for n in range(len(small))] + [small + b"\0"] + flipped:
        assert refusal(sample.decompress, damaged, model).startswith("file: ")


@pytest.mark.parametrize("claim, says", [
    ({"version": sample.VERSION + 1}, "version"), ({"version": 0}, "version"), ({"width": 0}, "0x16"), ({"height": 0}, "32x0"),
    ({"width": 65535, "height": 65535}, "65535x65535"), ({"quality": 0}, "quality"), ({"quality": 4}, "quality"),
    ({"block": 3}, "map"), ({"block": 8}, "map"), ({"block": 5}, "map")])
def test_false_claims_are_refused(claim, says, model):
    """A checksum can be forged; other versions, empty or huge pictures and unknown levels are refused by what they claim."""
    assert says in refusal(sample.decompress, sealed(b"", identity=model.identity, **claim), model, "claim.hfd")


def test_extreme_symbols(model):
    """Symbols may be as large as the code allows: they come back, and the picture has the size that the file says."""
    k = np.zeros((24, 1, 2), np.int64)
    k[::2, 0, 0], k[1::2, 0, 1] = 2 ** 30, -2 ** 30
    data = sealed(entropy.encode(k, model.tables, 0), identity=model.identity)
    assert (sample.decode_latent(sample.parse(data, "file"), model, "file")[0].numpy() == k).all()
    assert decode(data, model).shape == (16, 32, 3)


def test_the_identity_names_the_autoencoder_only(tiny_model, data, model, tmp_path):
    """A file decodes with the autoencoder that made it and no other; the diffusion model may be retrained, or be missing."""
    def nudge(part):
        def change(packed):
            next(iter(packed[part]["weights"].values())).view(-1)[0] += 0.01
        return change

    other = hfd.load_model(altered(tiny_model, tmp_path / "other.pt", nudge("autoencoder")))
    assert "--model" in refusal(sample.decompress, data, other)

    retrained = hfd.load_model(altered(tiny_model, tmp_path / "retrained.pt", lambda p: [
        w.mul_(1.5) for w in p["diffusion"]["weights"].values() if w.is_floating_point()]))
    assert (decode(data, retrained, rho=0) == decode(data, model, rho=0)).all()
    assert (decode(data, retrained) != decode(data, model)).any()

    stage1 = hfd.load_model(altered(tiny_model, tmp_path / "stage1.pt", lambda p: p["diffusion"].update(weights={})))
    assert (decode(data, stage1, rho=0) == decode(data, model, rho=0)).all()
    assert "--rho 0" in refusal(sample.decompress, data, stage1)


# ------------------------------------------------------------------------------------------------------
# Checkpoints that must be refused
# ------------------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_refused(tiny_model, tmp_path):
    """A missing file, a text, half a checkpoint, other people's weights: each is refused in one line that names the file."""
    whole = Path(tiny_model).read_bytes()
    (tmp_path / "text.pt").write_text("not a checkpoint\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "empty.pt", "foreign.pt", "list.pt", "missing.pt"):
        assert name in refusal(hfd.load_model, tmp_path / name)
    for length in range(1, len(whole), len(whole) // 10):
        (tmp_path / "half.pt").write_bytes(whole[:length])
        assert "half.pt" in refusal(hfd.load_model, tmp_path / "half.pt")


class Bomb:
    """Unpickled carelessly, this creates the file `target`; it might as well delete one."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path, recwarn):
    """A pickle can carry code; `weights_only` refuses it unread, so a downloaded checkpoint is as harmless as a picture."""
    torch.save({"format": hfd.FORMAT, "recipe": Bomb(tmp_path / "ran")}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("zip.pt", "plain.pt"):
        assert name in refusal(hfd.load_model, tmp_path / name)
    assert not (tmp_path / "ran").exists() and not recwarn.list


def test_a_damaged_checkpoint_is_refused(tiny_model, model, tmp_path):
    """A flipped bit anywhere in weights, training state or settings is noticed: silently, it would turn every picture a little wrong. Where zip
    archives have bits that nobody reads, it changes nothing."""
    packed = torch.load(tiny_model, weights_only=True)
    torch.save(packed | {"training": {"ema": {"weight": torch.arange(30_000.0)}}}, tmp_path / "whole.pt")
    whole, rng, refused = (tmp_path / "whole.pt").read_bytes(), np.random.default_rng(0), 0
    unharmed = lambda other: other.identity == model.identity and hfd.fingerprint(other.diffusion.state_dict(), other.training["ema"]) == hfd.fingerprint(
        model.diffusion.state_dict(), {"weight": torch.arange(30_000.0)}) and other.recipe == model.recipe
    places = [*rng.integers(0, len(whole), 100), *rng.integers(len(whole) - 20_000, len(whole), 200)]       # the archive's directory comes last
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped.pt").write_bytes(damaged)
        try:
            assert unharmed(hfd.load_model(tmp_path / "flipped.pt"))
        except HFDError as error:
            refused += 1
            assert "flipped.pt" in str(error) and len(str(error).splitlines()) == 1
    assert refused > 0.7 * len(places)


def test_incomplete_checkpoints_are_refused(tiny_model, tmp_path):
    """Whatever part is missing, the model is refused when it is loaded, not when it is used."""
    whole = torch.load(tiny_model, weights_only=True)
    parts = [(key,) for key in whole] + [(a, b) for a in ("tables", "autoencoder", "diffusion") for b in whole[a]]
    for *outer, key in parts:
        packed = copy.deepcopy(whole)
        del (packed[outer[0]] if outer else packed)[key]
        torch.save(packed, tmp_path / "part.pt")
        assert "part.pt" in refusal(hfd.load_model, tmp_path / "part.pt")


def test_forged_checkpoints_are_refused(tiny_model, tmp_path):
    """Parts that do not fit each other, layers of terabytes or without end, texts that double thirty times, a tensor that repeats one
    number, weights that share their numbers, a file that unpacks to a hundred times its size: refused when loaded, and not built."""
    claim = lambda part, **config: lambda packed: packed[part]["config"].update(config)
    note = lambda recipe: lambda packed: packed.update(recipe={"autoencoder": recipe})
    doubled = functools.reduce(lambda inner, _: [inner, inner], range(30), "x")
    foreign = vars(entropy.freeze(entropy.Prior(3, 1), torch.ones(1, 3)))
    changes = [lambda packed: packed.update(tables=foreign), lambda packed: packed["tables"]["cdf"].sub_(1), claim("diffusion", levels=1),
               claim("autoencoder", widths=()), claim("autoencoder", widths=(10 ** 6,) * 4), claim("autoencoder", blocks=(0, 0, 0, 10 ** 12)),
               claim("diffusion", blocks=10 ** 12), claim("diffusion", levels=10 ** 12), claim("diffusion", objective="guess"),
               claim("autoencoder", blocks=(-10 ** 12, 10 ** 12, 0, 0)), claim("diffusion", widths=(8,) * 10 ** 5), claim("diffusion", eta=doubled),
               claim("autoencoder", blocks=doubled),
               claim("diffusion", eta=10 ** 600), claim("diffusion", widths=(8,) * 80, blocks=90), note(1), note({None: 1}),
               lambda packed: packed.update(recipe={("no", "text"): {}}), note({str(i): "" for i in range(1000)}), note({"data": "x" * 10 ** 6}),
               note({"data": doubled}), note({"data": 10 ** 600})]
    paths = [altered(tiny_model, tmp_path / f"forged{i}.pt", change) for i, change in enumerate(changes)]
    packed = torch.load(tiny_model, weights_only=True)
    packed["diffusion"]["weights"]["net.level.weight"] = torch.zeros(1).expand(3, 10 ** 12)
    torch.save(packed, tmp_path / "expanded.pt")

    def share(packed):
        weights = packed["autoencoder"]["weights"]
        pool = torch.zeros(max(t.numel() for t in weights.values()))
        packed["autoencoder"]["weights"] = {name: pool[:t.numel()].view(t.shape) for name, t in weights.items()}
    paths.append(altered(tiny_model, tmp_path / "shared.pt", share))
    torch.save(torch.zeros(5 * 10 ** 7), tmp_path / "large.pt")
    with zipfile.ZipFile(tmp_path / "large.pt") as large, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in large.infolist():
            bomb.writestr(member.filename, large.read(member))
    assert (tmp_path / "bomb.pt").stat().st_size < 10 ** 6
    # {t40: 1}, where t0 = (1, 1) and each t holds the one before it twice: to be a key it must be hashed, element by element.
    trap = b"\x80\x02}K\x01K\x01\x86q\0" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(40)) + b"K\x01s."
    deep = b"\x80\x02})" + b"\x85" * 10 ** 5 + b"K\x01s."                 # {((((...)))): 1}
    # Calls that torch allows: two gigabytes of zeros; and a text whose hexadecimal digits are written in hexadecimal digits, forty times.
    zeros = b"\x80\x02}cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85RK\x01s."
    text, encode = lambda words: b"X" + struct.pack("<I", len(words)) + words, b"c_codecs\nencode\n"
    digits = text(b"x") + text(b"latin1") + b"\x86R" + (text(b"hex_codec") + b"\x86R") * 40 + b"K\x01s."
    once, anew = (b"\x80\x02}" + calls + digits for calls in (encode + b"q\0" + b"h\0" * 40, encode * 41))       # remembered, or named each time
    one_hash = b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (i * (2 ** 61 - 1)).to_bytes(10, "little") + b"K\x01" for i in range(1, 30_000)) + b"u."
    long = b"\x80\x02}(" + b"K\x01K\x01" * 10 ** 6 + b"u."              # {1: 1}, at length
    with zipfile.ZipFile(tiny_model) as whole:
        members = {member.filename: whole.read(member) for member in whole.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    # Also where torch would look, but somebody who looks less closely would not: in capitals, or under a name that is there twice.
    for i, forgery in enumerate(([(name, trap)], [(name, deep)], [(name, zeros)], [(name, once)], [(name, anew)], [(name, one_hash)], [(name, long)],
                                [(name.replace(".pkl", ".PKL"), trap)],
                                 [(name.replace(".pkl", ".PKL"), trap), (name, members[name])], [(name, trap), (name, members[name])])):
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / f"trap{i}.pt", "w") as forged:
            for pair in forgery + [(other, content) for other, content in members.items() if other != name]:
                forged.writestr(*pair)
        paths.append(tmp_path / f"trap{i}.pt")
    (tmp_path / "appended.pt").write_bytes(trap + Path(tiny_model).read_bytes())

    def disguised(packed):
        packed["recipe"] = OrderedDict(packed["recipe"])
        packed["recipe"].values = OrderedDict                   # an attribute that hides the method: there seems to be nothing in it
    paths.append(altered(tiny_model, tmp_path / "disguised.pt", disguised))
    for path in [*paths, tmp_path / "expanded.pt", tmp_path / "bomb.pt", tmp_path / "appended.pt"]:
        begin = time.perf_counter()
        with memory_within(200):
            assert str(path) in refusal(hfd.load_model, path)
        assert time.perf_counter() - begin < 2


def test_without_permission(tiny_model):
    """What may not be read is refused in one line, whatever it is."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path, root = Path(folder) / "secret", os.geteuid() == 0
        path.write_bytes(b"secret")
        path.chmod(0)
        if root:                                                # who may read everything: let us be nobody
            try:
                os.seteuid(65534)
            except OSError:
                pytest.skip("this root may not become anybody else")
        try:
            for read in (sample.read_file, sample.open_picture, hfd.load_model):
                assert str(path) in refusal(read, str(path))
        finally:
            if root:
                os.seteuid(0)


# ------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, photo, data, small):
    """A folder with what the commands below need."""
    photo.save(tmp_path / "photo.png")
    (tmp_path / "photo.hfd").write_bytes(data)
    (tmp_path / "broken.hfd").write_bytes(data[:-1] + b"?")
    (tmp_path / "taken.png").write_text("precious")
    (tmp_path / "taken.hfd").write_text("precious")
    return tmp_path


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_compress_info_decompress(desk, photo, tiny_model, model, data, capsys):
    """The three commands in a row: they print what they did, and the files hold what the functions return."""
    files = [str(desk / name) for name in ("photo.png", "new.hfd", "new.png")]
    sample.main(["compress", *files[:2], "--quality", "2", "--seed", "7", "--model", tiny_model])
    assert (desk / "new.hfd").read_bytes() == data
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("estimated", "payload", "file", f"{len(data)} bytes", "100x75"))
    sample.main(["info", files[1]])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("100x75", f"version {sample.VERSION}", model.identity.hex(), str(len(data))))
    sample.main(["info", "--model", tiny_model])
    assert model.identity.hex() in capsys.readouterr().out
    sample.main(["decompress", *files[1:], "--steps", "2", "--model", tiny_model])
    assert (np.asarray(Image.open(files[2])) == decode(data, model)).all()
    sample.main(["compress", *files[:2], "--seed", "7", "--plus", "--force", "--model", tiny_model])
    sample.main(["info", files[1]])
    assert "blocks of 64" in capsys.readouterr().out and (desk / "new.hfd").stat().st_size > len(data)
    sample.main(["decompress", *files[1:], "--rho", "0", "--force", "--model", tiny_model])
    assert (np.asarray(Image.open(files[2])) == decode(data, model, rho=0)).all()
    sample.main(["compress", *files[:2], "--seed", "7", "--refine", "3", "--force", "--model", tiny_model])
    assert "refining step 3/3" in capsys.readouterr().err and (desk / "new.hfd").read_bytes() != data
    sample.main(["decompress", *files[1:], "--rho", "0", "--force", "--model", tiny_model])
    assert 15 < sample.psnr(photo, Image.open(files[2])) < float("inf")


REFUSED = ["compress missing.png new.hfd", "compress photo.hfd new.hfd", "compress photo.png taken.hfd", "compress photo.png .",
           "compress photo.png nowhere/new.hfd", "compress photo.png taken.hfd/new.hfd", "compress photo.png new.hfd --quality 9", "compress photo.png new.hfd --quality 0", "compress photo.png new.hfd --refine -1",
           "compress photo.png new.hfd --model photo.png", "compress photo.png new.hfd --device abacus",
           "decompress missing.hfd new.png", "decompress photo.png new.png", "decompress broken.hfd new.png", "decompress . new.png",
           "decompress broken.hfd taken.png --force", "decompress photo.hfd taken.png", "decompress photo.hfd new.xyz",
           "decompress photo.hfd new", "decompress photo.hfd new.png --rho 1.5", "decompress photo.hfd new.png --rho nan",
           "decompress photo.hfd new.png --steps 0", "decompress photo.hfd new.png --eta 0", "decompress photo.hfd new.png --eta nan",
           "decompress photo.hfd new.png --patch 0", "decompress photo.hfd new.png --patch 70000", "decompress photo.hfd new.png --context -1", "info missing.hfd",
           "info photo.png", "info broken.hfd", "info .", "info"]


@pytest.mark.parametrize("command", REFUSED)
def test_refused_commands_leave_everything_as_it_was(command, desk, tiny_model, monkeypatch):
    """What cannot be done ends in one line and a failure status, and no file is made, changed or left half written."""
    monkeypatch.chdir(desk)
    before, words = contents(desk), command.split()
    if words[0] != "info" and "--model" not in words:
        words += ["--model", tiny_model]
    with pytest.raises(SystemExit) as caught:
        hfd.run(lambda: sample.main(words))
    text = caught.value.code                                    # a text: Python prints it to stderr, and exits with status 1
    assert text.startswith("error: ") and len(text.splitlines()) == 1
    assert contents(desk) == before


def test_refusals_as_the_shell_sees_them(desk):
    """A script can rely on it: exit status not 0, one line on stderr, nothing on stdout, no traceback."""
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "compress", "miss\ning.png", "new.hfd"], cwd=desk, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: miss\\ning.png") and done.stderr.count("\n") == 1


def test_run_after_run(desk, data, tiny_model):
    """Another process makes the very same file and picture as this one did; also under a name that is no text, which Unix allows."""
    new, said = (b"new\xff", b"new\\udcff") if sys.platform == "linux" else (b"new", b"new")      # (macOS has no such names)
    for words in ((b"compress", b"photo.png", new + b".hfd", b"--seed", b"7"), (b"decompress", new + b".hfd", new + b".png", b"--steps", b"2")):
        done = subprocess.run([sys.executable, ROOT / "sample.py", *words, b"--model", tiny_model], cwd=desk, capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
        assert done.returncode == 0 and said + b"." in done.stdout, done.stderr
    assert (desk / os.fsdecode(new + b".hfd")).read_bytes() == data
    with Image.open(desk / os.fsdecode(new + b".png")) as image:
        assert (np.asarray(image) == decode(data, hfd.load_model(tiny_model))).all()


def test_a_file_appears_whole_or_not_at_all(desk):
    """Writing goes to a temporary name first: if it fails half-way, the old file is still there, and nothing else is."""
    before = contents(desk)

    def fail(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_as_torch_does(f):
        try:
            fail(f)
        finally:
            raise RuntimeError("and now the end of the archive is missing, too")
    for name, way in (("taken.hfd", fail), ("new.hfd", fail), ("new.hfd", fail_as_torch_does)):
        with pytest.raises(HFDError, match=f"{name}: cannot be written .No space left"):
            hfd.write_atomically(str(desk / name), way)
        assert contents(desk) == before
    hfd.write_atomically(str(desk / "taken.hfd"), lambda f: f.write(b"whole"))
    assert contents(desk) == before | {"taken.hfd": b"whole"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_ending_writes_a_picture_or_is_refused(photo, tmp_path):
    """Pillow knows some seventy endings, and some it cannot write: those are refused like any other mistake."""
    refused = []
    for ending in sorted(Image.registered_extensions()):
        path = str(tmp_path / f"new{ending}")
        try:
            sample.check_target(path, False, picture=True)
            sample.save_picture(photo, path)
            if Image.registered_extensions()[ending] in Image.OPEN:     # (a PDF, Pillow can only write)
                with Image.open(path) as image:
                    assert image.size == photo.size
            assert os.path.getsize(path)
        except (HFDError, OSError) as error:                    # the two kinds that `hfd.run` turns into one line
            assert len(str(error).splitlines()) == 1 and not os.path.exists(path)
            refused.append(ending)
    assert ".png" not in refused and len(refused) > 5 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("command, defaults", [
    ("demo", ["demo", "2", "checkpoints"]), ("compress", ["2", "0", "checkpoints", "auto"]),
    ("decompress", [str(hfd.STEPS), "1.0", str(hfd.PATCH), str(hfd.CONTEXT), "auto"]), ("info", [])])
def test_help_names_the_defaults(command, defaults, capsys):
    """--help is complete: every option says what happens if it is left out."""
    with pytest.raises(SystemExit) as caught:
        sample.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    named = [part.split(")")[0] for part in text.split("(default: ")[1:]]
    assert caught.value.code == 0 and len(named) >= len(defaults)
    for default in defaults:
        assert any(default in name for name in named)
