"""Using: the file format and the command line.

    python sample.py demo                                   see it work, on a portrait that ships with matplotlib
    python sample.py compress photo.jpg photo.hfd --quality 2
    python sample.py decompress photo.hfd photo.png
    python sample.py info photo.hfd

An .hfd file is a header of 22 bytes, an optional HFD+ map, the range-coded latent, and nothing else. Numbers are big-endian:

    bytes  0-2   "HFD"
           3     version of the format, 3
           4     quality level, 1 .. Q
           5     HFD+: side of the map's blocks in pixels as a power of two (4 .. 7), or 0 for no map
           6-9   width, height in pixels, 16 bits each
          10-13  seed of the sampler's noise
          14-17  identity of the autoencoder: SHA-256 of its tables and weights, first 4 bytes
          18-21  CRC-32 of everything else
          22-    with HFD+: bytes of the map (32 bits), the map; then the latent

The identity names the autoencoder only. The diffusion model adds no bits and may be retrained, and old files still decode.
"""
import argparse
import bisect
import io
import math
import os
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps

import entropy
import hfd
from hfd import CELL, HFDError

MAGIC, VERSION = b"HFD", 3
HEADER = struct.Struct(">3sBBBHHI4s")       # without the checksum, which follows it
HEADER_BYTES = HEADER.size + 4
MAX_PIXELS = 100_000_000                    # stated limit of a picture; a larger one is refused before any memory is taken
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2    # Pillow refuses at twice this, also a picture that is hidden in another's file, an icon's say
MODEL = str(Path(__file__).parent / "checkpoints" / "hfd.pt")

# Pictures in and out ----------------------------------------------------------------------------------


def open_picture(path):
    """Any picture that Pillow opens, as 8-bit RGB and upright. Returns (PIL image, list of remarks on what was dropped)."""
    remarks = []
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:   # Pillow warns at half of the limit
            if max(image.size) > 65535:
                raise Image.DecompressionBombError
            if image.format == "EPS":           # Pillow would have a PostScript interpreter run it
                raise HFDError(f"{path}: is a program that draws, not a picture; convert it to .png first")
            if getattr(image, "n_frames", 1) > 1:
                remarks.append(f"only the first of {image.n_frames} frames is kept")
            # Of 16-bit colour Pillow itself keeps 8. How a format tells its depth: as a raw mode, or PPM as its largest value.
            deep = any(";16" in str(tile.args) or isinstance(tile.args, tuple) and tile.codec_name.startswith("ppm") and tile.args[-1] > 255
                       for tile in image.tile)
            if deep or image.mode.startswith("I"):
                remarks.append("16 bits per sample are reduced to 8")
                if "transparency" in image.info:    # one of the 16-bit colours, which cannot be told from others in 8
                    raise HFDError(f"{path}: has a colour that is transparent, in 16 bits; convert it to 8 bits first")
            profile = image.info.get("icc_profile")
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise HFDError(f"{path}: floating-point pixels have no fixed range; convert it to 8 or 16 bits first")
            if image.mode.startswith("I"):                                      # 16 bits, which Pillow's convert would clip
                values = np.asarray(image).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise HFDError(f"{path}: its values do not fit into 16 bits; convert it first")
                image = Image.fromarray((values // 257).astype(np.uint8))
            if image.has_transparency_data:
                remarks.append("transparency is dropped: the picture is laid on white")
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image if image.mode in ("RGB", "CMYK") else image.convert("RGB")
            if profile:
                try:
                    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                    given = image.convert("L") if source.profile.xcolor_space.strip() == "GRAY" else image
                    converted = ImageCms.profileToProfile(given, source, target, outputMode="RGB")
                    # Most profiles are sRGB's own, under one name or another: a change of 2/255 is not worth one more rounding.
                    if image.mode != "RGB" or np.max(ImageChops.difference(image, converted).getextrema()) > 2:
                        image = converted
                        remarks.append("colours are converted to sRGB")
                except (ImageCms.PyCMSError, OSError):
                    remarks.append("its colour profile cannot be used; colours are taken for sRGB")
            return image.convert("RGB"), remarks
    except HFDError:
        raise
    except Image.DecompressionBombError:
        raise HFDError(f"{path}: too large; the limit is {MAX_PIXELS // 10 ** 6} megapixels and 65535 a side") from None
    except FileNotFoundError:
        raise HFDError(f"{path}: no such file") from None
    except Exception as error:      # a broken picture can make Pillow raise nearly anything
        raise HFDError(f"{path}: cannot be read as a picture ({error})") from None


def save_picture(image, path):
    """Write a PIL image in the format that the ending of `path` names. The file appears complete or not at all."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    try:
        hfd.write_atomically(path, lambda f: image.save(f, kind))
    except (ValueError, KeyError, OSError, OverflowError) as error:     # what Pillow raises for a format that holds no RGB, or not so much
        raise HFDError(f"{path}: cannot be written ({error}); try .png") from None


def check_target(path, force, picture=False):
    """Refuse, before any work is done, an output that exists, has nowhere to go or a name that says no picture format."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise HFDError(f"{path}: is a folder or a device; name a file")
    if os.path.exists(path) and not force:
        raise HFDError(f"{path}: exists already; --force overwrites it")
    folder = os.path.dirname(os.path.abspath(path))
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise HFDError(f"{path}: its folder does not exist, or may not be written to")
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if picture and (kind not in Image.SAVE or kind in ("ICO", "ICNS")):         # icons change a picture's size
        raise HFDError(f"{path}: the ending names no picture format that can be written; try .png")


def to_tensor(image, device):
    """PIL RGB image to (1, 3, H', W') in [-1, 1], continued to multiples of 16 by repeating the last row and column
    (which costs few bits, and is cropped off again)."""
    array = np.asarray(image)
    array = np.pad(array, [(0, -array.shape[0] % CELL), (0, -array.shape[1] % CELL), (0, 0)], mode="edge")
    return torch.from_numpy(array).to(device).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)


def to_image(x, width, height):
    """(1, 3, H', W') in [-1, 1] to a PIL RGB image of width x height."""
    x = x[0, :, :height, :width].add(1).mul_(127.5).round_().clamp_(0, 255).byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def psnr(a, b):
    """Peak signal-to-noise ratio of two PIL RGB images of one size, in dB, over all three channels; inf if equal."""
    mse = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255 ** 2 / mse)) if mse else float("inf")


# The file format --------------------------------------------------------------------------------------


def compress(image, model, quality, seed=0, block=0, refine=0, on_step=lambda step: None):
    """PIL RGB image to (bytes of an .hfd file, report). quality: 1 .. Q, more is better and larger. block: 0, or 16 .. 128,
    a power of two, to add the HFD+ map in blocks of that side. refine, on_step: as in hfd.Autoencoder.encode.

    The report holds `estimated` (cross-entropy), `payload` and `file` in bits per pixel, and seconds per part."""
    levels = len(model.autoencoder.config.lambdas)
    if not 1 <= quality <= levels:
        raise HFDError(f"--quality must lie between 1 and {levels}, not {quality}")
    device = model.device
    clock = [hfd.clock(device)]
    x = to_tensor(image, device)                                                                # (1, 3, H', W')
    k = model.autoencoder.encode(x, quality - 1, refine=refine, on_step=on_step)                # (1, M, H'/16, W'/16)
    side = b""                                              # what HFD+ adds
    if block:
        need_diffusion(model)
        std = model.diffusion.residual_std[quality - 1:quality]                                 # (1, 12)
        energy = hfd.residual_energy(x, model.autoencoder.decode(k, quality - 1), std, block)   # (1, 1, H'/block, W'/block)
        coded = entropy.encode_map(energy[0, 0].int().cpu(), hfd.ENERGY_LEVELS)
        side = struct.pack(">I", len(coded)) + coded
    k = k[0].cpu().numpy()
    clock.append(hfd.clock(device))
    coder = entropy.coded(k, model.tables, quality - 1)
    payload = side + coder.finish()
    clock.append(hfd.clock(device))
    header = HEADER.pack(MAGIC, VERSION, quality, block.bit_length() - 1 if block else 0, image.width, image.height, seed,
                         model.identity)
    data = header + struct.pack(">I", zlib.crc32(header + payload)) + payload
    pixels = image.width * image.height
    return data, {"estimated": (coder.bits + 8 * len(side)) / pixels,
                  "payload": 8 * len(payload) / pixels, "file": 8 * len(data) / pixels,
                  "seconds": {"encoder": clock[1] - clock[0], "range encoder": clock[2] - clock[1]}}


def parse(data, name):
    """Check an .hfd file as far as that is possible without a model. Returns its header as a dictionary, with `payload`."""
    if len(data) < HEADER_BYTES or data[:3] != MAGIC:
        raise HFDError(f"{name}: not an .hfd file" + (", or cut off in its header" if data[:3] == MAGIC else ""))
    _, version, quality, block, width, height, seed, identity = HEADER.unpack_from(data)
    if version != VERSION:
        raise HFDError(f"{name}: written in version {version} of the format; this program reads version {VERSION}")
    payload = memoryview(data)[HEADER_BYTES:]                                   # no copy yet: a hostile file may be large
    if zlib.crc32(payload, zlib.crc32(data[:HEADER.size])) != int.from_bytes(data[HEADER.size:HEADER_BYTES], "big"):
        raise HFDError(f"{name}: damaged or cut off (its checksum does not match)")
    if not width or not height or width * height > MAX_PIXELS:
        raise HFDError(f"{name}: claims to be {width}x{height} pixels; the limit is {MAX_PIXELS // 10 ** 6} megapixels")
    energy = b""
    if block:
        size = int.from_bytes(payload[:4], "big")
        if block not in (4, 5, 6, 7) or len(payload) < 4 + size:
            raise HFDError(f"{name}: its HFD+ map cannot be read")
        energy, payload = payload[4:4 + size], payload[4 + size:]
    return {"quality": quality, "width": width, "height": height, "seed": seed, "identity": identity,
            "block": 1 << block if block else 0, "energy": bytes(energy), "payload": bytes(payload)}


def need_diffusion(model, instead=""):
    """Refuse what only stage 2 can do. instead: what else the user might want."""
    if model.diffusion is None:
        raise HFDError(f"this checkpoint has no diffusion model yet; {instead}train one (python train.py diffusion --help)")


def decode_latent(header, model, name):
    """The integer latent (1, M, h, w) in a parsed file, and its HFD+ map (1, 1, h, w) or None, for the model that wrote it."""
    if header["identity"] != model.identity:
        raise HFDError(f"{name}: made by model {header['identity'].hex()}, and this one is {model.identity.hex()}; name the right one with --model")
    config = model.autoencoder.config
    if not 1 <= header["quality"] <= len(config.lambdas):
        raise HFDError(f"{name}: claims quality {header['quality']}, which the model does not have")
    try:
        shape = config.latents, -(-header["height"] // CELL), -(-header["width"] // CELL)
        energy = None
        if header["block"]:
            cells = header["block"] // CELL                                                     # per block and side
            blocks = math.ceil(shape[1] / cells), math.ceil(shape[2] / cells)
            energy = entropy.decode_map(header["energy"], hfd.ENERGY_LEVELS, blocks)
            energy = energy.repeat(cells, 0).repeat(cells, 1)[:shape[1], :shape[2]]             # (h, w)
            energy = torch.from_numpy(energy)[None, None].to(model.device)                      # (1, 1, h, w)
        k = entropy.decode(header["payload"], model.tables, header["quality"] - 1, shape)       # (M, h, w)
    except ValueError as error:
        raise HFDError(f"{name}: {error}") from None
    return torch.from_numpy(k)[None].to(model.device), energy


def decompress(data, model, name="file", rho=1.0, seed=None, **settings):
    """Bytes of an .hfd file to (PIL RGB image, report with seconds per part).

    rho, the realism knob, mixes x_hat + rho (x_sample - x_hat): 0 is the autoencoder's picture, 1 the full sample. seed:
    None for the one in the file. settings: as in hfd.sample_picture."""
    header, device = parse(data, name), model.device
    if rho > 0:
        need_diffusion(model, "use --rho 0, or ")
    clock = [hfd.clock(device)]
    q = header["quality"] - 1
    k, energy = decode_latent(header, model, name)
    clock.append(hfd.clock(device))
    x_hat = model.autoencoder.decode(k, q)
    del k                                                   # frees 10 bytes a pixel before the sampler starts
    clock.append(hfd.clock(device))
    if rho > 0:
        seed = header["seed"] if seed is None else seed
        x = hfd.sample_picture(model.diffusion, x_hat, q, seed=seed, energy=energy, **settings)
        x_hat.lerp_(x, rho)
    clock.append(hfd.clock(device))
    seconds = {"range decoder": clock[1] - clock[0], "decoder": clock[2] - clock[1], "diffusion": clock[3] - clock[2]}
    return to_image(x_hat, header["width"], header["height"]), {"seconds": seconds}


# The command line -------------------------------------------------------------------------------------


def progress(what, steps):
    """A callback that shows how far `what` is and how long it will take, on a terminal's one line."""
    begin = time.time()

    def show(step):
        """Overwrite the line with the state after this step."""
        left = (time.time() - begin) / step * (steps - step)
        sys.stderr.write(f"\r{what} step {step:.0f}/{steps}, {left:.0f} s left " + ("\n" if step == steps else ""))
        sys.stderr.flush()
    return show


def read_file(path):
    """The bytes of a file that is no larger than any .hfd file could be."""
    try:
        with open(path, "rb") as f:
            data = f.read(4 * MAX_PIXELS + 1)
    except OSError as error:
        raise HFDError(f"{path}: {error.strerror}") from None
    if len(data) > 4 * MAX_PIXELS:
        raise HFDError(f"{path}: too large for an .hfd file")
    return data


def run_compress(args):
    """compress: picture to .hfd file."""
    check_target(args.output, args.force)
    if args.refine < 0:
        raise HFDError("--refine takes a number of steps, 0 for none")
    image, remarks = open_picture(args.input)
    for remark in remarks:
        print(f"note: {remark}")
    model = hfd.load_model(args.model, hfd.pick_device(args.device))
    data, report = compress(image, model, args.quality, args.seed, 64 if args.plus else 0, args.refine,
                            progress("refining", args.refine))
    hfd.write_atomically(args.output, lambda f: f.write(data))
    print(f"{hfd.printable(args.output)}: {len(data)} bytes for {image.width}x{image.height} pixels. bpp: {report['estimated']:.4f} estimated, "
          f"{report['payload']:.4f} payload, {report['file']:.4f} file")
    print("seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in report["seconds"].items()))


def run_decompress(args):
    """decompress: .hfd file to picture."""
    check_target(args.output, args.force, picture=True)
    if not 0 <= args.rho <= 1:
        raise HFDError("--rho must lie in [0, 1]")
    if not all(1 <= n <= 65535 for n in (args.steps, args.patch, args.batch)) or not 0 <= args.context <= 65535:
        raise HFDError("--steps, --patch and --batch must be at least 1, --context at least 0, and all at most 65535")
    if args.eta is not None and not 0 < args.eta < math.inf:
        raise HFDError("--eta must be a number above 0")
    data = read_file(args.input)
    parse(data, args.input)                     # refuse a broken file before loading a model for it
    model = hfd.load_model(args.model, hfd.pick_device(args.device))
    settings = {name: getattr(args, name) for name in ("steps", "sampler", "eta", "patch", "context", "grouped", "batch")}
    image, report = decompress(data, model, args.input, args.rho, args.seed, on_step=progress("sampling", args.steps), **settings)
    save_picture(image, args.output)
    print(f"{hfd.printable(args.output)}: {image.width}x{image.height} pixels. seconds: " +
          ", ".join(f"{name} {s:.2f}" for name, s in report["seconds"].items()))


def run_info(args):
    """info: the header of a file, or how a checkpoint was made."""
    if (args.input is None) == (args.model is None):
        raise HFDError("info takes an .hfd file, or --model for a checkpoint")
    if args.model:
        model = hfd.load_model(args.model)
        print(f"{hfd.printable(args.model)}: HFD checkpoint, autoencoder {model.identity.hex()}")
        for network in filter(None, (model.autoencoder, model.diffusion)):
            print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} million parameters: {network.config}")
        for part, record in model.recipe.items():           # how each part was made, and what was measured
            print(hfd.printable(f"{part}:"))
            for name, value in record.items():
                print("  " + hfd.printable(f"{name:10} {value}"))
        return
    data = read_file(args.input)
    header = parse(data, args.input)
    pixels = header["width"] * header["height"]
    print(f"{hfd.printable(args.input)}: HFD file, version {VERSION}\n  size       {header['width']}x{header['height']} pixels\n"
          f"  quality    {header['quality']}\n  seed       {header['seed']}\n  model      {header['identity'].hex()}\n"
          f"  HFD+ map   {'blocks of %d' % header['block'] if header['block'] else 'none'}\n"
          f"  bytes      {len(data)}: {HEADER_BYTES} header, {len(header['energy'])} map, {len(header['payload'])} latent\n"
          f"  bpp        {8 * len(data) / pixels:.4f}")


def largest_within(size, image, kind="jpeg", **options):
    """The best JPEG, or whatever Pillow calls `kind`, of at most `size` bytes, or the smallest there is. Returns (bytes, its quality)."""
    def encode(quality):
        """The bytes of the file at that quality."""
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality, **options)
        return buffer.getvalue()
    # Files grow with quality, so halving finds how many of the qualities 1 .. 95 fit.
    quality = max(1, bisect.bisect_right(range(1, 96), size, key=lambda quality: len(encode(quality))))
    return encode(quality), quality


def contact_sheet(pictures, detail, zoom):
    """Pictures side by side, each (caption, PIL image), and below each an enlarged detail (left, top, right, bottom)."""
    font, margin, line = ImageFont.load_default(20), 8, 30
    width, height = pictures[0][1].size
    crop = (detail[2] - detail[0]) * zoom, (detail[3] - detail[1]) * zoom
    sheet = Image.new("RGB", (len(pictures) * (width + margin) - margin, line + height + margin + crop[1]), "white")
    for i, (caption, image) in enumerate(pictures):
        left = i * (width + margin)
        ImageDraw.Draw(sheet).text((left + 4, 3), caption, "black", font)
        sheet.paste(image, (left, line))
        sheet.paste(image.crop(detail).resize(crop, Image.NEAREST), (left, line + height + margin))
    return sheet


DETAIL = (325, 440, 453, 552)        # of the portrait: cloth and ribbons


def run_demo(args):
    """demo: the whole path on a portrait, beside a JPEG of as many bytes."""
    from matplotlib.cbook import get_sample_data        # here, since nothing else needs matplotlib
    os.makedirs(args.out, exist_ok=True)
    paths = [os.path.join(args.out, name) for name in ("portrait.hfd", "portrait.png", "comparison.png")]
    with get_sample_data("grace_hopper.jpg") as f:
        image, _ = open_picture(f)
    model = hfd.load_model(args.model, hfd.pick_device(args.device))
    data, report = compress(image, model, args.quality)
    hfd.write_atomically(paths[0], lambda f: f.write(data))
    blurry, _ = decompress(data, model, rho=0)
    picture, decoding = decompress(data, model, on_step=progress("sampling", hfd.STEPS))
    save_picture(picture, paths[1])
    jpeg, quality = largest_within(len(data), image, optimize=True)
    opened = Image.open(io.BytesIO(jpeg)).convert("RGB")
    bpp = lambda size: f"{8 * size / (image.width * image.height):.3f}"
    sheet = contact_sheet([("original", image), (f"JPEG, {len(jpeg)} bytes", opened),
                           (f"autoencoder, {len(data)} bytes", blurry), (f"HFD, {len(data)} bytes", picture)], DETAIL, 4)
    save_picture(sheet, paths[2])
    print(f"{'':12} {'bytes':>6} {'bpp':>6} {'PSNR':>6}")
    for name, size, decoded in (("JPEG", len(jpeg), opened), ("autoencoder", len(data), blurry), ("HFD", len(data), picture)):
        print(f"{name:12} {size:6} {bpp(size):>6} {psnr(image, decoded):6.2f}")
    if len(jpeg) > len(data):
        print(f"(JPEG cannot go lower: this is its quality {quality})")
    print(f"bpp of the HFD file: {report['estimated']:.4f} estimated, {report['payload']:.4f} payload, {report['file']:.4f} file")
    print("seconds: " + ", ".join(f"{n} {s:.2f}" for n, s in (report["seconds"] | decoding["seconds"]).items()))
    print("wrote " + hfd.printable(", ".join(paths)))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of every flag that has one to tell."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def command_line():
    """The parser of all commands, with every default in its help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = dict(formatter_class=Help)
    demo = commands.add_parser("demo", help="compress and decode a portrait, and compare", **show)
    demo.add_argument("--out", metavar="DIR", default="demo", help="folder for what it writes")
    c = commands.add_parser("compress", help="picture to .hfd file", **show)
    c.add_argument("input", help="any picture that Pillow opens, if it has 8 or 16 bits and is no PostScript")
    c.add_argument("output", help=".hfd file to write")
    for p in (demo, c):
        p.add_argument("--quality", type=int, default=2, metavar="Q", help="1 (smallest file) to 6 (best picture)")
    c.add_argument("--plus", action="store_true", help="HFD+: add a map of the missing detail's energy, under 0.001 bpp for a photo")
    c.add_argument("--refine", type=int, default=0, metavar="N",
                   help="search a better latent for this picture in N steps: more for the same bits, slowly; 100 is a good number")
    c.add_argument("--seed", type=seed_number, default=0, help="seed of the sampler's noise, stored in the file")
    d = commands.add_parser("decompress", help=".hfd file to picture", **show)
    d.add_argument("input", help=".hfd file")
    d.add_argument("output", help="picture to write; the ending says the format, .png keeps it exact")
    d.add_argument("--steps", type=int, default=hfd.STEPS, help="denoising steps: network evaluations per patch")
    d.add_argument("--sampler", choices=sorted(hfd.SAMPLERS),
                   help="ddpm: ancestral; ddim: deterministic, first order (for a flow model Euler's method, and the default); dpm: deterministic, "
                   "second order, else the default")
    d.add_argument("--rho", type=float, default=1.0, help="realism: 0 is the autoencoder's picture, 1 the full sample")
    d.add_argument("--seed", type=seed_number, help="another draw than the one the file asks for")
    d.add_argument("--eta", type=float, help="shift of the noise schedule: less is less noise; the paper has 0.5, by default it follows the residual's size")
    d.add_argument("--patch", type=int, default=hfd.PATCH, help="pixels a side that the U-Net works on at a time")
    d.add_argument("--context", type=int, default=hfd.CONTEXT, help="pixels around each patch that it sees; 128 is exact")
    d.add_argument("--batch", type=int, default=1, help="patches at once; more of them fill a GPU, and take its memory")
    d.add_argument("--grouped", action="store_true", help="patches in four groups that take turns, as in the paper")
    for p in (c, d):
        p.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    for p in (demo, c, d):
        p.add_argument("--model", default=MODEL, metavar="FILE", help="checkpoint")
        p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    info = commands.add_parser("info", help="what an .hfd file or a checkpoint says of itself")
    info.add_argument("input", nargs="?", help=".hfd file")
    info.add_argument("--model", nargs="?", const=MODEL, metavar="FILE", help=f"a checkpoint instead (alone: {Path(MODEL).name}, which ships)")
    return parser


def seed_number(text):
    """A seed as the file stores it, 32 bits; argparse's error for anything else."""
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise argparse.ArgumentTypeError("a seed is a whole number from 0 to 4294967295")
    return value


def main(argv=None):
    """Run one command. argv: a list of words, or None for the shell's."""
    args = command_line().parse_args(argv)
    {"demo": run_demo, "compress": run_compress, "decompress": run_decompress, "info": run_info}[args.command](args)


if __name__ == "__main__":
    hfd.run(main)
