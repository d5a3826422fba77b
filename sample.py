"""Using: the file format, pictures in and out, and the command line.

    python sample.py compress photo.jpg photo.hfd --quality 2
    python sample.py decompress photo.hfd photo.png
    python sample.py info photo.hfd                   or a model's folder

An .hfd file is a header of 25 bytes, which are FIELDS and a CRC-32 of everything else; with HFD+ a
map, its length in 32 bits before it; and the range-coded latent. Numbers are big-endian.
"""
import argparse
import io
import itertools
import json
import math
import os
import re
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin

import entropy
import hfd
from hfd import CELL, HFDError

MAGIC = b"HFD\x04"          # the last byte is the version of the format
FIELDS = {                  # of the header, as `struct` spells them
    "magic": "4s",          # bytes 0-3
    "quality": "B",         # 4: 1 .. Q; the networks' q is one less
    "block": "B",           # 5: log2 of the side of the HFD+ map's blocks in pixels; 0: no map
    "width": "H", "height": "H",    # 6-9: in pixels
    "mean": "3s",           # 10-12: mean colour, R, G, B; coarse steps would lose a faint tint
    "seed": "I",            # 13-16: of the sampler's noise
    "identity": "4s",       # 17-20: of the autoencoder (hfd.Model); the denoiser may be retrained
}
HEADER = struct.Struct(">" + "".join(FIELDS.values()))
HEADER_BYTES = HEADER.size + 4
BLOCKS = (16, 32, 64, 128)                  # sides of an HFD+ map's blocks; training has no 128
PLUS_BLOCK = 64                             # that of --plus
MAX_PIXELS = 100_000_000                    # a larger picture is refused before memory is taken
MODEL = str(Path(__file__).parent / "checkpoints")

# The file format ----------------------------------------------------------------------------------
def compress(image, model, quality, seed=0, block=0):
    """PIL RGB image to (bytes of an .hfd file, report). quality: 1 .. Q, more is better and larger.
    block: 0, or one of BLOCKS to add the HFD+ map. HFDError for what cannot be coded so.

    The report holds `estimated` (cross-entropy), `payload` and `file` in bits per pixel, and
    `seconds` of each part."""
    levels, q = len(model.autoencoder.lambdas), quality - 1
    if image.mode != "RGB" or max(image.size) > 65535 or image.width * image.height > MAX_PIXELS:
        raise HFDError(f"a picture of mode {image.mode}, {image.width}x{image.height} pixels; it "
                       f"must be RGB, of {MAX_PIXELS} pixels and 65535 a side at most")
    if not 1 <= quality <= levels or block not in (0, *BLOCKS):
        raise HFDError(f"quality must lie between 1 and {levels}, an HFD+ block be in {BLOCKS}")
    if block and need_diffusion(model).config.kind != "plus":
        raise HFDError("this model's denoiser takes no HFD+ map; leave --plus out")
    times = [clock(model.device)]
    mean = np.asarray(image).mean(axis=(0, 1)).round().astype(np.uint8).tobytes()   # 3 bytes
    header = dict(zip(FIELDS, (MAGIC, quality, max(block.bit_length() - 1, 0), image.width,
                               image.height, mean, seed, model.identity)))
    x, plus = to_tensor(image, model.device), b""                                   # (1, 3, H', W')
    k = model.autoencoder.encode(x, q)                                              # (1, M, h, w)
    if block:
        x_hat = with_mean(model.autoencoder.decode(k, q), header)                   # (1, 3, H', W')
        energy = hfd.residual_energy(x, x_hat, model.diffusion.residual_std[q:quality], block)
        coded, _ = entropy.encode(energy[0].cpu().numpy(), hfd.MAP_TABLES, 0)
        plus = struct.pack(">I", len(coded)) + coded
    times.append(clock(model.device))
    latent, ideal = entropy.encode(k[0].cpu().numpy(), model.tables, q)
    times.append(clock(model.device))
    head, payload = HEADER.pack(*header.values()), plus + latent
    data = head + struct.pack(">I", zlib.crc32(head + payload)) + payload
    sizes = {"estimated": ideal + 8 * len(plus), "payload": 8 * len(payload), "file": 8 * len(data)}
    report = {part: bits / (image.width * image.height) for part, bits in sizes.items()}
    seconds = dict(zip(("encoder", "range encoder"), np.diff(times).tolist()))
    return data, report | {"seconds": seconds}


def parse(data, name):
    """Check an .hfd file as far as that is possible without a model. Returns its header as a
    dictionary, with `block` in pixels, `energy` and `latent`, the bytes of both. HFDError for any
    other file."""
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise HFDError(f"{name}: not an .hfd file of version {MAGIC[3]}, or cut off in its header")
    header = dict(zip(FIELDS, HEADER.unpack_from(data)))
    energy, payload = b"", data[HEADER_BYTES:]
    crc = int.from_bytes(data[HEADER.size:HEADER_BYTES], "big")
    if zlib.crc32(payload, zlib.crc32(data[:HEADER.size])) != crc:
        raise HFDError(f"{name}: damaged or cut off (its checksum does not match)")
    if not 0 < header["width"] * header["height"] <= MAX_PIXELS:
        size = f"{header['width']}x{header['height']}"
        raise HFDError(f"{name}: claims {size} pixels; 1 to {MAX_PIXELS} are possible")
    if header["block"]:
        header["block"], size = 1 << header["block"], 4 + int.from_bytes(payload[:4], "big")
        if header["block"] not in BLOCKS or len(payload) < size:
            raise HFDError(f"{name}: its HFD+ map cannot be read")
        energy, payload = payload[4:size], payload[size:]
    return header | {"energy": energy, "latent": payload}


def decode_latent(header, model, name):
    """The integer latent (1, M, h, w) in a parsed file, and its HFD+ map (1, 1, h, w) or None.
    HFDError for another model's file, or one whose data is damaged."""
    if header["identity"] != model.identity:
        raise HFDError(f"{name}: made by model {header['identity'].hex()}, and this one is "
                       f"{model.identity.hex()}; name the right one with --model")
    Q, M = model.autoencoder.log_step.shape
    if not 1 <= header["quality"] <= Q:
        raise HFDError(f"{name}: claims quality {header['quality']}, which the model does not have")
    h, w = math.ceil(header["height"] / CELL), math.ceil(header["width"] / CELL)
    energy, n = None, header["block"] // CELL               # n cells per block and side
    try:
        if n:
            blocks = 1, math.ceil(h / n), math.ceil(w / n)
            energy = entropy.decode(header["energy"], hfd.MAP_TABLES, 0, blocks)
            energy = torch.from_numpy(energy.repeat(n, 1).repeat(n, 2)[:, :h, :w])  # (1, h, w)
            energy = energy[None].to(model.device)                                  # (1, 1, h, w)
        k = entropy.decode(header["latent"], model.tables, header["quality"] - 1, (M, h, w))
    except ValueError as error:
        raise HFDError(f"{name}: {error}") from None
    return torch.from_numpy(k)[None].to(model.device), energy


def with_mean(x, header):
    """A picture (1, 3, H', W'), moved in place to the mean colour that the header tells."""
    mean = torch.tensor(list(header["mean"]), device=x.device) / 127.5 - 1          # (3,)
    found = x[0, :, :header["height"], :header["width"]].mean(dim=(1, 2))           # (3,)
    return x.add_((mean - found)[:, None, None]).clamp_(-1, 1)


def decompress(data, model, name="file", rho=1.0, seed=None, **settings):
    """Bytes of an .hfd file to (PIL RGB image, report with seconds per part).

    rho, the realism knob, mixes x_hat + rho (x_sample - x_hat): 0 is the autoencoder's picture, 1
    the full sample. seed: None for the one in the file. settings: of hfd.sample_picture."""
    header, times = parse(data, name), [clock(model.device)]
    k, energy = decode_latent(header, model, name)
    times.append(clock(model.device))
    q = header["quality"] - 1
    x_hat = with_mean(model.autoencoder.decode(k, q), header)                       # (1, 3, H', W')
    del k                                       # frees 10 bytes a pixel before the sampler starts
    times.append(clock(model.device))
    if rho > 0:
        settings |= {"seed": header["seed"] if seed is None else seed, "energy": energy}
        x = hfd.sample_picture(need_diffusion(model), x_hat, q, **settings)
        x_hat.lerp_(with_mean(x, header), rho)
    times.append(clock(model.device))
    seconds = dict(zip(("range decoder", "decoder", "diffusion"), np.diff(times).tolist()))
    return to_image(x_hat, header["width"], header["height"]), {"seconds": seconds}


def need_diffusion(model):
    """The model's denoiser. HFDError if stage 2 was not trained."""
    if model.diffusion is None:
        raise HFDError("this model has no denoiser.npz yet: train one, or decompress with --rho 0")
    return model.diffusion


def clock(device):
    """Seconds, once the device has done what it was asked: a GPU answers before it has worked."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


# Pictures in and out ------------------------------------------------------------------------------
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2    # Pillow warns at this and refuses at twice as many
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26     # some editors keep their history in a PNG's text


def open_picture(path):
    """Any picture that Pillow opens, as 8-bit RGB and upright: (PIL image, remarks on what was
    dropped). HFDError for what cannot be read, or would change its looks."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return as_rgb(image)
    except Exception as error:      # a broken picture can make Pillow raise nearly anything
        reason = str(error) or type(error).__name__
        raise HFDError(f"{path}: cannot be read as a picture ({reason})") from None


def as_rgb(image):
    """A PIL image that was just opened, as `open_picture` returns it. ValueError if it refuses."""
    if max(image.size) > 65535:                             # before any pixel is decoded
        raise ValueError("a side exceeds 65535 pixels")
    remarks = []
    deep = image.mode[0] == "I" or any(";16" in str(tile.args) for tile in image.tile)
    # An EPS is a program, which Pillow would have run; floats ("F") may have any range; and if one
    # colour of 16 bits stands for transparent, Pillow would look for it among those of 8.
    if image.format == "EPS" or image.mode == "F" or deep and "transparency" in image.info:
        raise ValueError("convert it to an 8-bit .png first")
    merged = "MPO", "PSD"                   # these have previews, or layers, in place of frames
    if getattr(image, "n_frames", 1) > 1 and image.format not in merged:
        remarks.append(f"only the first of {image.n_frames} frames is kept")
    profile = image.info.get("icc_profile")
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0    # white is zero
    image = ImageOps.exif_transpose(image)
    if deep:                                # of colour, Pillow itself keeps 8 bits
        remarks.append("16 bits per sample are reduced to 8")
    if image.mode[0] == "I":                # of grey it would clip them, and forgets `inverted`
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values do not fit into 16 bits")
        image = Image.fromarray(((65535 - values if inverted else values) >> 8).astype(np.uint8))
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if image.has_transparency_data:
        remarks.append("transparency is dropped: the picture is laid on white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert(mode)
    if profile:
        try:
            source, srgb = io.BytesIO(profile), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
            # Most profiles are sRGB's own under some name: not worth one more rounding.
            change = ImageChops.difference(image.convert("RGB"), converted).getextrema()
            if image.mode == "CMYK" or np.max(change) > 2:
                remarks.append("colours are converted to sRGB")
                image = converted
        except ImageCms.PyCMSError:         # broken, or made for another kind of picture
            remarks.append("its colour profile cannot be used; colours are taken for sRGB")
    return image.convert("RGB"), remarks


def to_tensor(image, device):
    """PIL RGB image to (1, 3, H', W') in [-1, 1], continued to multiples of 16 by repeating the
    last row and column (which costs few bits, and is cropped off again)."""
    pad = (0, -image.height % CELL), (0, -image.width % CELL), (0, 0)
    array = np.pad(np.asarray(image), pad, mode="edge")                             # (H', W', 3)
    return torch.from_numpy(array).to(device).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)


def to_image(x, width, height):
    """(1, 3, H', W') in [-1, 1] to a PIL RGB image of width x height."""
    x = x[0, :, :height, :width].add(1).mul_(127.5).round_().clamp_(0, 255).byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def save_picture(image, path):
    """Write a PIL image in the format that the ending of `path` names, completely or not at all."""
    try:
        kind = Image.registered_extensions()[Path(path).suffix.lower()]
        hfd.write_atomically(path, lambda f: image.save(f, kind))
    except (ValueError, KeyError, OSError, OverflowError) as error:
        raise HFDError(f"{path}: cannot be written ({error}); try .png") from None


def check_target(path, force, size=None):
    """Refuse, before any work is done, an output that exists or cannot be. size: (width, height) of
    the picture that it shall hold; None for an .hfd file. HFDError."""
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.lexists(path) and not (force and os.path.isfile(path)):
        raise HFDError(f"{path}: exists already; --force overwrites a file")
    named = path != "-" and not path.endswith(os.sep) and len(os.fsencode(name)) <= 255
    if not (named and os.access(folder, os.W_OK | os.X_OK)):
        raise HFDError(f"{path}: no file of that name can be written there")
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    most = {"JPEG": 65500, "WEBP": 16383, "PNG": 65535, "TIFF": 65535, "BMP": 65535, "PPM": 65535,
            "AVIF": 65535, "JPEG2000": 65535}.get(kind, 0)      # pixels a side
    if kind and not size:
        raise HFDError(f"{path}: its ending names a picture format; name an .hfd file")
    if size and max(size) > most:
        raise HFDError(f"{path}: its ending names no format for such a picture; try .png")


# The command line ---------------------------------------------------------------------------------
def progress(steps):
    """A callback that shows, on one line of a terminal, how far sampling is."""
    begin, calls = time.time(), itertools.count(1)

    def show():
        """Overwrite the line with the state after one more step."""
        step = next(calls)
        left = (time.time() - begin) / step * (steps - step)
        print(f"\rsampling step {step}/{steps}, {left:.0f} s left ",
              end="\n" if step == steps else "", file=sys.stderr, flush=True)
    return show


def told(report):
    """A report's seconds, and its bits per pixel, if any, as text."""
    seconds = "seconds: " + ", ".join(f"{part} {s:.2f}" for part, s in report["seconds"].items())
    bits = ", ".join(f"{value:.4f} {part}" for part, value in report.items() if part != "seconds")
    return f"bpp: {bits}; {seconds}" if bits else seconds


def run_compress(args):
    """compress: picture to .hfd file."""
    check_target(args.output, args.force)
    image, remarks = open_picture(args.input)
    for remark in remarks:
        print(f"note: {remark}")
    model = hfd.load_model(args.model, pick_device(args.device))
    block = PLUS_BLOCK if args.plus else 0
    data, report = compress(image, model, args.quality, args.seed, block)
    hfd.write_atomically(args.output, lambda f: f.write(data))
    print(f"{args.output}: {len(data)} bytes for {image.width}x{image.height} pixels")
    print(told(report))


def run_decompress(args):
    """decompress: .hfd file to picture."""
    numbers = 1 if args.eta is None else args.eta, args.steps, args.patch, args.context + 1
    if not (0 <= args.rho <= 1 and all(0 < n < 2 ** 16 for n in numbers)):
        raise HFDError("--rho must lie in [0, 1], --context in [0, 65534], and --eta, --steps and "
                       "--patch be above 0 and below 65536")
    data = Path(args.input).read_bytes()
    header = parse(data, args.input)                    # before a model is loaded for a broken file
    check_target(args.output, args.force, (header["width"], header["height"]))
    model = hfd.load_model(args.model, pick_device(args.device))
    knobs = "rho", "seed", "steps", "sampler", "eta", "patch", "context"
    settings = {name: getattr(args, name) for name in knobs}
    settings["on_step"] = progress(args.steps)
    image, report = decompress(data, model, args.input, **settings)
    save_picture(image, args.output)
    print(f"{args.output}: {image.width}x{image.height} pixels; {told(report)}")


def run_info(args):
    """info: the header of a file, or how a model was made."""
    if os.path.isdir(args.path):
        model = hfd.load_model(args.path)
        print(f"{args.path}: HFD model, autoencoder {model.identity.hex()}")
        for network in filter(None, (model.autoencoder, model.diffusion)):
            millions = sum(p.numel() for p in network.parameters()) / 1e6
            print(f"{millions:.2f} million parameters: {network.config}")
        print(json.dumps(model.recipes, indent=1))      # JSON spells control characters out
        return
    data = Path(args.path).read_bytes()
    header = parse(data, args.path)
    width, height, block = header["width"], header["height"], header["block"]
    print(f"{args.path}: HFD file, version {MAGIC[3]}, made by model {header['identity'].hex()}")
    print(f"{width}x{height} pixels, quality {header['quality']}, seed {header['seed']}, " +
          (f"HFD+ map in blocks of {block}" if block else "no HFD+ map"))
    latent = len(header["latent"])
    print(f"{len(data)} bytes ({8 * len(data) / (width * height):.4f} bpp): {HEADER_BYTES} header, "
          f"{len(data) - HEADER_BYTES - latent} map, {latent} latent")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells the default of every flag that has one to tell, and leaves docstrings' lines alone."""

    def _get_help_string(self, action):
        untold = action.default is None or action.default is False
        return action.help if untold else super()._get_help_string(action)


def seed_number(text):
    """A seed as the file stores it, 32 bits; argparse's error for anything else."""
    if not 0 <= int(text) < 2 ** 32:
        raise argparse.ArgumentTypeError("a seed is a whole number from 0 to 4294967295")
    return int(text)


def pick_device(name="auto"):
    """The device that `name` says, or for "auto" the accelerator, if there is one, or the CPU."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.empty(0, device=name).cpu()       # which "meta", where nothing has values, cannot do
    except (RuntimeError, AssertionError):
        raise HFDError(f"device '{name}' cannot be used here; try --device cpu") from None
    return torch.device(name)


def run(main):
    """Call main(); turn what a user can put right into one line and exit status 1."""
    if hasattr(sys.stdout, "reconfigure"):                  # for names that a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")   # (stderr is set so from the start)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                                 # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        full = re.search("out of memory|allocate memory", str(error))       # a GPU's, a CPU's
        if isinstance(error, RuntimeError) and not full:
            raise
        sys.exit("error: the memory is full; ask for less at once (--patch, --batch, --crop, "
                 "--megapixels), or if it is a GPU's, take --device cpu")
    except (HFDError, OSError) as error:
        path = getattr(error, "filename", None)
        text = f"{path}: {error.strerror}" if path else str(error)
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)   # steers no terminal
        sys.exit(f"error: {text}")


def main(argv=None):
    """Run one command. argv: a list of words, or None for the shell's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_subparsers(dest="command", required=True).add_parser
    c = add("compress", help="picture to .hfd file", formatter_class=Help)
    d = add("decompress", help=".hfd file to picture", formatter_class=Help)
    info = add("info", help="what a file or a model says of itself", formatter_class=Help)
    info.add_argument("path", nargs="?", default=MODEL, help=".hfd file, or a model's folder")
    c.add_argument("input", help="any picture that Pillow opens, of 8 or 16 bits and no PostScript")
    c.add_argument("output", help=".hfd file to write")
    c.add_argument("--quality", type=int, default=2, help="1 (smallest) to 6 (best picture)")
    c.add_argument("--plus", action="store_true", help="HFD+: add a map of where detail is missing")
    c.add_argument("--seed", type=seed_number, default=0, help="of the sampler's noise")
    d.add_argument("input", help=".hfd file")
    d.add_argument("output", help="picture to write; its ending names the format, .png is exact")
    d.add_argument("--steps", type=int, default=hfd.STEPS, help="network evaluations per patch")
    d.add_argument("--rho", type=float, default=1.0, help="realism: 0 invents nothing, 1 is full")
    d.add_argument("--seed", type=seed_number, help="another draw than the one the file asks for")
    d.add_argument("--sampler", choices=hfd.SAMPLERS, help="left out: dpm, or for a flow ddim")
    d.add_argument("--eta", type=float, help="shift of the schedule; left out: by what is missing")
    d.add_argument("--patch", type=int, default=hfd.PATCH, help="pixels a side, worked on at once")
    d.add_argument("--context", type=int, default=hfd.CONTEXT, help="pixels around; 128 is exact")
    for p in (c, d):
        p.add_argument("--force", action="store_true", help="overwrite the output if it exists")
        p.add_argument("--model", default=MODEL, help="folder of the model")
        p.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    args = parser.parse_args(argv)
    commands = {"compress": run_compress, "decompress": run_decompress, "info": run_info}
    commands[args.command](args)


if __name__ == "__main__":
    run(main)
