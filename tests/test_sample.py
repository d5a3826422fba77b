"""What sample.py promises: any picture becomes a small file, a file always decodes alike, and
anything else is refused in one line."""
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
import torch
from PIL import Image, ImageCms, PngImagePlugin
from conftest import memory_within

import hfd
import sample
import train
from hfd import HFDError


@pytest.fixture(scope="module")
def data(photo, model):
    """The bytes of a real file."""
    return sample.compress(photo, model, 2, seed=7)[0]


def decode(data, model, **settings):
    """The decoded pixels as integers, after two sampling steps."""
    return np.asarray(sample.decompress(data, model, **({"steps": 2} | settings))[0]).astype(int)


def sealed(version=sample.VERSION, quality=1, block=0, width=32, height=16, identity=bytes(4)):
    """An .hfd file that says what we like, with no latent and a checksum that is right."""
    header = sample.HEADER.pack(sample.MAGIC, version, quality, block, width, height, bytes(3), 0,
                                identity)
    return header + struct.pack(">I", zlib.crc32(header))


def refusal(function, *arguments):
    """The text with which a call is refused: an HFDError of one line that says something."""
    with pytest.raises(HFDError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert len(text) > 10 and len(text.splitlines()) == 1
    return text


def altered(tiny_model, folder, part, change):
    """Make a folder with a copy of the tiny model, after change(arrays) on one part of it."""
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    about, arrays = hfd.read_archive(folder / f"{part}.npz")
    change(arrays)
    hfd.write_archive(folder / f"{part}.npz", about, arrays)


# There and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (33, 16), (100, 75), (5000, 10)])
def test_any_size_round_trips(size, photo, model):
    """Cells have 16x16 pixels; sizes that do not fit are continued inside, and cropped on the way
    out. Estimated bits are real ones, within 0.2 % + 16 bytes, and all else is the header."""
    image = photo.crop((0, 0) + size)
    for quality in (1, 3):
        data, report = sample.compress(image, model, quality)
        estimated, payload, file = (report[part] * size[0] * size[1] / 8
                                    for part in ("estimated", "payload", "file"))
        assert abs(payload - estimated) <= 0.002 * estimated + 16
        assert round(file) == len(data) == round(payload) + sample.HEADER_BYTES
        blurry, _ = sample.decompress(data, model, rho=0)
        assert blurry.size == size and blurry.mode == "RGB" and sample.psnr(image, blurry) > 13
    assert decode(data, model).shape == (size[1], size[0], 3)


def test_same_input_same_bytes_same_pixels(photo, model, data):
    """The same picture gives the same file, which gives the same pixels. The file's seed is the
    default; another one draws another picture of the same latent. rho mixes blurry and sampled."""
    assert sample.compress(photo, model, 2, seed=7)[0] == data
    for settings in ({}, {"sampler": "ddpm"}, {"grouped": True, "patch": 32}):
        assert (decode(data, model, **settings) == decode(data, model, seed=7, **settings)).all()
    assert (decode(data, model, seed=8) != decode(data, model)).any()
    assert (decode(data, model, seed=8, rho=0) == decode(data, model, rho=0)).all()
    blurry, half, full = (decode(data, model, rho=rho) for rho in (0, 0.5, 1))
    assert (full != blurry).any() and np.abs(half - (blurry + full) / 2).max() <= 1


def test_the_header_is_as_documented(photo, data, model):
    """Anyone can read the header with the table at the top of sample.py: fixed places, big-endian,
    a CRC-32 of all the rest."""
    width, height, seed, crc = (int.from_bytes(data[a:b], "big")
                                for a, b in ((6, 8), (8, 10), (13, 17), (21, 25)))
    assert data[:6] == b"HFD" + bytes([4, 2, 0]) and sample.HEADER_BYTES == 25
    assert (width, height, seed, data[17:21]) == (100, 75, 7, model.identity)
    assert np.abs(np.asarray(photo).mean((0, 1)) - list(data[10:13])).max() <= 0.5
    assert crc == zlib.crc32(data[:21] + data[25:])


def test_the_energy_map_travels_in_the_file(photo, model, data):
    """HFD+ adds a few bytes beside the same latent: the sampler heeds them, the autoencoder's
    picture does not change."""
    x = sample.to_tensor(photo, "cpu")
    x_hat = sample.reconstruct(model.autoencoder.encode(x, 1), sample.parse(data, "file"), model)
    for block, most in ((16, 1 + 5 * 7 // 2), (128, 1)):
        plus, _ = sample.compress(photo, model, 2, seed=7, block=block)
        header = sample.parse(plus, "file")
        assert header["payload"] == sample.parse(data, "file")["payload"]
        assert len(plus) == len(data) + 4 + len(header["energy"]) <= len(data) + 4 + most
        sent = hfd.residual_energy(x, x_hat, model.diffusion.residual_std[1:2], block)
        sent = sent.repeat_interleave(block // 16, 2).repeat_interleave(block // 16, 3)
        # It arrives in cells of 16 pixels.
        assert (sample.decode_latent(header, model, "file")[1] == sent[..., :5, :7]).all()
        assert (decode(plus, model) != decode(data, model)).any()
        assert (decode(plus, model, rho=0) == decode(data, model, rho=0)).all()


def test_a_library_refuses_what_it_would_get_wrong(photo, model):
    """Called from a notebook: other modes than RGB, blocks that no decoder knows, levels that the
    model has not, and two pictures at once are refused, not coded as something else."""
    for mode in ("RGBA", "L", "P", "YCbCr", "HSV"):
        assert mode in refusal(sample.compress, photo.convert(mode), model, 2)
    for quality, block in ((2, 48), (2, 256), (0, 0), (4, 0)):
        assert "quality" in refusal(sample.compress, photo, model, quality, 0, block)
    two = sample.to_tensor(photo, "cpu").repeat(2, 1, 1, 1)
    for function in (lambda: model.autoencoder.encode(two, 0),
                     lambda: model.autoencoder.decode(torch.zeros(2, 24, 1, 1), 0),
                     lambda: hfd.sample_picture(model.diffusion, two, 0, steps=1)):
        with pytest.raises(ValueError, match="one picture"):
            function()


# Pictures of every kind ---------------------------------------------------------------------------


def write_png(path, width, height, depth, colour, rows):
    """A PNG of any kind, also of those that Pillow only reads. rows: the pixel data, big-endian."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
             (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts))


def test_plain_kinds_lose_nothing(photo, tmp_path):
    """Grey, palette, black-and-white and CMYK pictures become RGB, with nothing to remark on."""
    for mode in ("L", "P", "1", "CMYK", "RGB"):
        photo.convert(mode).save(tmp_path / "kind.tiff")
        image, remarks = sample.open_picture(tmp_path / "kind.tiff")
        assert image.mode == "RGB" and image.size == photo.size and remarks == []
        assert sample.psnr(image, photo.convert(mode).convert("RGB")) > 25


def test_transparency_is_laid_on_white(tmp_path):
    """Three channels have no room for a fourth: what is transparent becomes white, as is said."""
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 0, 0, 0))
    red.putpixel((1, 0), (255, 0, 0, 51))
    red.save(tmp_path / "alpha.png")
    red.quantize(4).save(tmp_path / "palette.png", transparency=red.quantize(4).getpixel((0, 0)))
    for name in ("palette.png", "alpha.png"):
        image, remarks = sample.open_picture(tmp_path / name)
        assert len(remarks) == 1 and "transparency" in remarks[0]
        assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((3, 3)) == (255, 0, 0)
    assert image.getpixel((1, 0)) == (255, 204, 204)


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3)])
def test_sixteen_bits_are_scaled_not_clipped(colour, channels, tmp_path):
    """65535 is white, not 255: Pillow would clip 16-bit grey, so we divide by 257, and say so."""
    values = np.array([0, 257, 25700, 32896, 65535], ">u2")
    write_png(tmp_path / "deep.png", 5, 1, 16, colour, b"\0" + values.repeat(channels).tobytes())
    image, remarks = sample.open_picture(tmp_path / "deep.png")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 100, 128, 255]
    assert len(remarks) == 1 and "16 bits" in remarks[0]


def test_white_may_be_zero(tmp_path):
    """A TIFF may count from white to black. Pillow heeds that with 8 bits, but not with 16."""
    for dtype, most in ((np.uint8, 255), (np.uint16, 65535)):
        values = np.array([[0, most // 5, most]], dtype)
        tags = ((256, 3), (257, 1), (258, 8 * values.itemsize), (262, 0), (273, 110), (277, 1),
                (278, 1), (279, values.nbytes))             # width, height, bits, white is 0, ...
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries
        (tmp_path / "white.tiff").write_bytes(head.ljust(110, b"\0") + values.tobytes())
        image, _ = sample.open_picture(tmp_path / "white.tiff")
        assert np.asarray(image)[0, :, 1].tolist() == [255, 204, 0]


def test_notes_in_a_picture_are_heeded_or_do_no_harm(photo, tmp_path):
    """A camera held upright stores a lying picture and a note to turn it; the codec keeps no notes,
    so it turns the picture. An editor may keep two megabytes of history: no reason to refuse."""
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6                                        # "turn me by 90 degrees clockwise"
    text.add_itxt("history", "brush " * 350_000, zip=True)
    photo.save(tmp_path / "turned.png", exif=exif, pnginfo=text)
    image, _ = sample.open_picture(tmp_path / "turned.png")
    assert sample.psnr(image, photo.transpose(Image.ROTATE_270)) == float("inf")


def test_colour_profiles_are_honoured(photo, tmp_path):
    """A picture in another colour space than sRGB, as phones make them, is converted; sRGB itself
    passes untouched, by whatever name; a broken profile is told."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")
    curve = srgb.index(b"para")                             # a gamma of 1, and still called sRGB
    linear = srgb[:curve + 8] + struct.pack(">HHI", 0, 0, 1 << 16) + srgb[curve + 16:]
    named = srgb.replace(b"s\0R\0G\0B", b"n\0o\0n\0e")
    opened, said, original = [], [], np.asarray(photo, int)
    for profile in (srgb, named, b"none", linear, swapped):
        photo.save(tmp_path / "photo.png", icc_profile=profile)
        image, remarks = sample.open_picture(tmp_path / "photo.png")
        opened.append(np.asarray(image, int))
        said.append(" ".join(remarks))
    assert all((pixels == original).all() for pixels in opened[:3])
    assert said[:2] == ["", ""] and "cannot be used" in said[2] and "to sRGB" in said[3] == said[4]
    assert opened[3].mean() > original.mean() + 20
    assert np.abs(opened[4] - original[..., ::-1]).max() <= 2


def test_grey_profiles_are_for_grey_pictures(photo, tmp_path):
    """Grey pictures may have a profile of one curve. Here it is a straight line: half of the light
    is 188 in sRGB. Some programs leave such a profile on a colour picture: its colours are kept."""
    white, curve = b"XYZ " + struct.pack(">4i", 0, 63190, 65536, 54061), b"curv" + bytes(8)
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 12) + white + curve
    head = struct.pack(">III4s8s", 188, 0, 0x02100000, b"mntr", b"GRAYXYZ ").ljust(36, b"\0")
    profile = ((head + b"acsp").ljust(68, b"\0") + white[8:]).ljust(128, b"\0") + tags
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png", icc_profile=profile)
    image, remarks = sample.open_picture(tmp_path / "grey.png")
    assert image.getpixel((0, 0)) == (188, 188, 188) and "to sRGB" in remarks[0]
    photo.save(tmp_path / "colour.png", icc_profile=profile)
    image, remarks = sample.open_picture(tmp_path / "colour.png")
    assert sample.psnr(image, photo) == float("inf") and "cannot be used" in remarks[0]


def test_of_an_animation_the_first_frame_is_kept(photo, tmp_path):
    """A codec for still pictures takes the first frame, and says how many there were. The preview
    in a phone's photograph is a second frame, and no animation: there is nothing to say."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image, remarks = sample.open_picture(tmp_path / "moving.gif")
    assert image.getpixel((4, 4)) == (255, 0, 0) and "first of 3 frames" in remarks[0]
    photo.save(tmp_path / "phone.mpo", save_all=True, append_images=[photo.resize((20, 15))])
    image, remarks = sample.open_picture((tmp_path / "phone.mpo").rename(tmp_path / "phone.jpg"))
    assert image.size == photo.size and remarks == []


def test_what_is_no_picture_is_refused(photo, tmp_path):
    """Not a picture, an empty or half a picture, a folder, no file, a program that draws, one
    without a fixed range: refused in one line that names it."""
    (tmp_path / "text.png").write_text("not a picture\n" * 20)
    (tmp_path / "empty.png").write_bytes(b"")
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
    rows = bytes(size[1] * (3 * size[0] + 1)) if min(size) < 10 else b""
    write_png(tmp_path / "bomb.png", *size, 8, 2, rows)
    hidden = (tmp_path / "bomb.png").read_bytes()           # in an icon of 16x16 pixels, it says
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(hidden), 22)
    (tmp_path / "bomb.ico").write_bytes(icon + hidden)
    for name in ("bomb.png", "bomb.ico"):
        with memory_within(100):
            assert "too large" in refusal(sample.open_picture, tmp_path / name)
    assert not recwarn.list


# Files and models that must be refused ------------------------------------------------------------


def test_false_claims_are_refused(model):
    """A checksum can be forged; other versions, empty or huge pictures, unknown levels and strange
    maps are refused by what they claim."""
    for says, claim in (("version", {"version": 99}), ("0x16 pixels", {"width": 0}),
                        ("65535x65535", {"width": 65535, "height": 65535}),
                        ("quality 0", {"quality": 0}), ("quality 4", {"quality": 4}),
                        ("map", {"block": 3}), ("map", {"block": 5})):
        assert says in refusal(sample.decompress, sealed(identity=model.identity, **claim), model)


def test_the_identity_names_the_autoencoder_only(tiny_model, data, model, tmp_path):
    """A file decodes with the autoencoder that made it and no other; the diffusion model may be
    retrained, or be missing."""
    other, new = tmp_path / "other", tmp_path / "new"
    altered(tiny_model, other, "autoencoder", lambda arrays: arrays["weights.offset"].fill(0.01))
    assert "another autoencoder" in refusal(hfd.load_model, other)      # than its denoiser's
    (other / "denoiser.npz").unlink()
    assert "--model" in refusal(sample.decompress, data, hfd.load_model(other))
    altered(tiny_model, new, "denoiser", lambda arrays: arrays["weights.net.stem.bias"].fill(0.5))
    retrained = hfd.load_model(new)
    (new / "denoiser.npz").unlink()
    stage1 = hfd.load_model(new)
    for one in (retrained, stage1):
        assert (decode(data, one, rho=0) == decode(data, model, rho=0)).all()
    assert (decode(data, retrained) != decode(data, model)).any()
    assert "--rho 0" in refusal(sample.decompress, data, stage1)


def test_a_ruined_model_makes_no_files(photo, tiny_model, tmp_path):
    """Weights that training blew up load, but their latents are no numbers that a file can hold:
    the encoder says so, before there is a file that nobody can decode."""
    altered(tiny_model, tmp_path, "autoencoder", lambda a: a["weights.log_step"].fill(-20))
    (tmp_path / "denoiser.npz").unlink()
    assert "training has failed" in refusal(sample.compress, photo, hfd.load_model(tmp_path), 1)


# The command line ---------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, photo, data, monkeypatch):
    """A folder with what the commands below need, and the working directory."""
    photo.save(tmp_path / "photo.png")
    files = {"photo": data, "broken": data[:-1] + b"?", "wide": sealed(width=65535, height=1)}
    for name, content in files.items():
        (tmp_path / f"{name}.hfd").write_bytes(content)
    for name in ("taken.png", "taken.hfd"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "dangling.hfd").symlink_to("gone.hfd")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """{name: bytes, or where a link points, or False for a folder}."""
    return {p.name: os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes()
            for p in folder.iterdir()}


def shell(words, monkeypatch, stdout=None, encoding="utf-8"):
    """(exit status, stdout, stderr) of a command, as a shell would see them."""
    out, err = stdout or io.TextIOWrapper(io.BytesIO(), encoding), io.TextIOWrapper(io.BytesIO())
    status = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            sample.run(lambda: sample.main(words))
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):                     # Python prints it, and exits with 1
                status = print(status, file=err) or 1
    err.flush()
    printed = "" if stdout else out.buffer.getvalue().decode()
    return status, printed, err.buffer.getvalue().decode()


def test_compress_info_decompress(desk, tiny_model, model, data, capsys):
    """The commands in a row print what they did, and files hold what the functions return."""
    def run(command, *words):
        sample.main([*command.split(), *(words or ("--model", tiny_model))])
        return capsys.readouterr().out
    printed = run("compress photo.png new.hfd --seed 7")
    assert (desk / "new.hfd").read_bytes() == data
    for word in ("estimated", "payload", "file", f"{len(data)} bytes", "100x75"):
        assert word in printed
    printed = run("info", "new.hfd")
    for word in ("100x75", f"version {sample.VERSION}", model.identity.hex(), str(len(data))):
        assert word in printed
    printed = run("info", tiny_model)                       # it tells a model's folder from a file
    assert model.identity.hex() in printed and "for tests" in printed
    for rho, options in ((1, "--steps 2"), (0, "--rho 0 --force")):
        run(f"decompress new.hfd new.png {options}")
        assert (np.asarray(Image.open("new.png")) == decode(data, model, rho=rho)).all()
    run("compress photo.png plus.hfd --plus")
    assert "blocks of 64" in run("info", "plus.hfd")


LONG = 252 * "n" + ".png"                                   # one byte more than a name may have
REFUSED = f"""
compress missing.png new.hfd               compress photo.hfd new.hfd
compress photo.png taken.hfd               compress photo.png .
compress photo.png dangling.hfd            compress photo.png dangling.hfd --force
compress photo.png empty --force           compress photo.png newdir/
compress photo.png new.jpg                 compress photo.png new.PNG
compress photo.png -                       compress - new.hfd
compress photo.png nowhere/new.hfd         compress photo.png taken.hfd/new.hfd
compress photo.png new.hfd --quality 9     compress photo.png new.hfd --device abacus
compress photo.png new.hfd --model empty   compress photo.png new.hfd --device meta
decompress missing.hfd new.png             decompress photo.png new.png
decompress broken.hfd new.png              decompress broken.hfd taken.png --force
decompress . new.png                       decompress photo.hfd taken.png
decompress photo.hfd new.xyz               decompress photo.hfd new.ico
decompress photo.hfd newdir/               decompress photo.hfd {LONG}
decompress photo.hfd -                     decompress photo.hfd new.png --rho 1.5
decompress wide.hfd new.jpg --model gone   decompress wide.hfd new.webp --model gone
decompress photo.hfd new.png --rho nan     decompress photo.hfd new.png --steps 0
decompress photo.hfd new.png --eta nan     decompress photo.hfd new.png --patch 0
decompress photo.hfd new.png --context -1  info missing.hfd
info photo.png                             info broken.hfd
info empty"""
REFUSED = [part for part in re.split(r"\n|  +", REFUSED) if part]


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command[:50])
def test_refused_commands_leave_everything_as_it_was(command, desk, tiny_model, monkeypatch):
    """What cannot be done ends in one line and a failure status, and no file is made, changed or
    left half written. An output that cannot be is known before a model has been looked for."""
    before, words = contents(desk), command.split()
    if words[0] != "info" and "--model" not in words:
        words += ["--model", tiny_model]
    status, printed, said = shell(words, monkeypatch)
    assert status == 1 and said.startswith("error: ") and len(said.splitlines()) == 1
    assert contents(desk) == before and printed == "" and "gone" not in said


def test_terminals_of_every_kind(desk, monkeypatch):
    """Names may have letters that a terminal cannot show, or that would steer it: they are spelt
    out. A pipe that closes early, as `| head -1` does, ends a command without a word."""
    (desk / "n\u00e9\u0416.hfd").write_bytes((desk / "photo.hfd").read_bytes())
    status, printed, _ = shell(["info", "n\u00e9\u0416.hfd"], monkeypatch, encoding="ascii")
    assert status == 0 and printed.startswith("n\\xe9\\u0416.hfd: HFD file")
    assert shell(["info", "a\nb\x1b"], monkeypatch)[2].startswith("error: a\\nb\\x1b")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        assert shell(["info", "photo.hfd"], monkeypatch, pipe) == (1, "", "")


def test_outputs_go_where_they_are_meant_to(desk, data, tiny_model, monkeypatch):
    """A link is followed and stays a link; an overwritten file keeps its mode. Writing goes to a
    temporary name first: if it fails half-way, the old file is there, and nothing else is."""
    (desk / "private.hfd").touch(0o600)
    (desk / "link.hfd").symlink_to("private.hfd")
    words = ["compress", "photo.png", "link.hfd", "--seed", "7", "--force", "--model", tiny_model]
    assert shell(words, monkeypatch)[0] == 0 and os.readlink("link.hfd") == "private.hfd"
    assert (desk / "private.hfd").read_bytes() == data
    assert (desk / "private.hfd").stat().st_mode & 0o777 == 0o600
    before = contents(desk)

    def fail(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name in ("taken.hfd", "new.hfd"):
        assert "No space left" in refusal(hfd.write_atomically, str(desk / name), fail)
        assert contents(desk) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_ending_writes_a_picture_or_is_refused(photo, tmp_path):
    """Pillow knows some seventy endings. Those that it cannot write are refused in one line."""
    refused = []
    for ending, kind in sorted(Image.registered_extensions().items()):
        path = str(tmp_path / f"new{ending}")
        try:
            sample.check_target(path, False, photo.size)
            sample.save_picture(photo, path)
            with open(path, "rb") as f:
                assert kind not in Image.OPEN or Image.open(f).size == photo.size   # (PDF is not)
        except HFDError as error:
            assert len(str(error).splitlines()) == 1 and not os.path.exists(path)
            refused.append(ending)
    assert ".png" not in refused and len(refused) > 5 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("main, command, defaults", [
    (sample.main, "compress", {"2", "0", sample.MODEL, "auto"}),
    (train.main, "autoencoder", {"0", "0.001", "128", "context", "20000", "auto"})])
def test_help_names_the_defaults(main, command, defaults, capsys):
    """--help is complete: every option that has a default says what it is."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert defaults <= {part.split(")")[0] for part in text.split("(default: ")}