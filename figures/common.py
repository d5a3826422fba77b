"""What the scripts share: pictures, a run that can be stopped and continued, one style of plot.

A script makes a `Run`, measures one point after another, draws, and calls `finish`. Every point is
saved as soon as it is there, so the same command, started again, goes on where it was stopped.
"""
import argparse
import functools
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import torch
from matplotlib import pyplot as plt
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw, ImageFont, ImageOps

import hfd
import sample
import train
from figures import metrics
from hfd import HFDError


def portrait():
    """The portrait that ships with matplotlib, a PIL RGB image of 512x600."""
    return sample.open_picture(get_sample_data("grace_hopper.jpg", asfileobj=False))[0]


def pictures(folder=None, count=None, middle=None):
    """[(name, PIL RGB image)] of a folder, or if None of the portrait and three dead leaves
    pictures. count: only so many, evenly spread. middle: of each only the square of that side
    around its centre. HFDError if one cannot be read: a mean over the others would mislead."""
    if folder is None:
        rng = np.random.default_rng(20230518)   # not a seed of train.py's: nothing that it draws
        leaves = [(f"leaves {n}", Image.fromarray(train.dead_leaves(256, rng))) for n in (1, 2, 3)]
        found = [("portrait", portrait()), *leaves]
    else:
        root = Path(folder) if os.path.isdir(folder) else Path(folder).parent
        found = [(str(path.relative_to(root)), path) for path in train.picture_files(folder)]
        if not found:
            raise HFDError(f"{folder}: no pictures found there; name a folder of pictures, or none")
    count = min(count or len(found), len(found))
    found = [found[n * len(found) // count] for n in range(count)]
    found = [(name, sample.open_picture(x)[0] if isinstance(x, Path) else x) for name, x in found]
    return [(name, around_centre(image, middle or max(image.size))) for name, image in found]


def around_centre(image, side):
    """The middle of a PIL picture, at most side x side pixels."""
    w, h = min(image.width, side), min(image.height, side)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def digest(*parts):
    """The first 8 bytes of a SHA-256, in hexadecimal, of bytes and networks."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part = b"".join(t.cpu().numpy().tobytes() for t in part.state_dict().values())
        whole.update(part)
    return whole.hexdigest()[:16]


def read_results(path):
    """(about, points): what a run has left in a JSON file. HFDError if it cannot be used."""
    try:
        results = json.loads(Path(path).read_text())
        return results.get("about"), dict(results.get("points", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise HFDError(f"{path}: damaged; make it anew (--fresh measures all again)") from None


# A run and its results ----------------------------------------------------------------------------
# Flags that some scripts have. Each says which of them it takes, and their defaults.
FLAGS = {
    "level": dict(type=int, help="quality level"),
    "levels": dict(type=int, nargs="+", metavar="LEVEL", help="quality levels"),
    "most": dict(type=int, help="no more steps than this"),
    "others": dict(nargs="+", metavar="DIR", help="more models with the same autoencoder"),
    "flow": dict(metavar="DIR", help="a model with the same autoencoder and --objective flow"),
    "factorized": dict(metavar="DIR", help="a model with the same transforms, a factorized prior"),
    "megapixels": dict(type=float, nargs="+", help="sizes to measure memory at"),
    "results": dict(metavar="FILE", help="what figures.rate_distortion wrote"),
    "batch": dict(type=int, help="crops per step; by default as train.py has it"),
}


class Run:
    """One run of figures/NAME.py, from its flags to its files. It has `args`, `device`, `model`,
    `names`, `images` (PIL RGB) and `kodak`, whether these are the 24 Kodak pictures, for which
    alone published numbers hold; `distances`, those of the feature set, if its network is there;
    and `numbers`, what there is to plot of a score.

    doc: the script's docstring. scored: whether it measures on pictures that the user names; else
    there is only the portrait. stage1: whether a model without a denoiser will do. flags: defaults
    of those of FLAGS that it takes. HFDError for what a user can mend."""

    def __init__(self, name, doc, argv=None, scored=True, stage1=False, **flags):
        argv = sys.argv[1:] if argv is None else argv
        parser = argparse.ArgumentParser(f"python -m figures.{name}", formatter_class=sample.Help,
                                         description=(doc or "").split("\n")[0])
        add = parser.add_argument
        add("--model", metavar="DIR", default=sample.MODEL, help="folder of the model")
        add("--out", metavar="DIR", default="runs/figures", help="folder for its .png and .json")
        add("--name", default=name, help="what those two are called, without their endings")
        add("--quick", action="store_true", help="less of everything: does it work?")
        add("--fresh", action="store_true", help="measure again what an earlier run has measured")
        add("--seed", type=sample.seed_number, default=0, help="seed of everything random")
        add("--device", default="auto", help="cuda, mps, cpu or auto")
        if scored:
            add("--images", metavar="DIR", help="folder of pictures, without hidden and linked "
                "folders in it; left out: the portrait and dead leaves")
            add("--middle", type=int, metavar="SIDE", help="only a square in the middle of each")
        for flag, default in flags.items():
            add(f"--{flag}", default=default, **FLAGS[flag])
        self.args = args = parser.parse_args(argv)
        counts = [getattr(args, flag, None) for flag in ("middle", "most", "batch")]
        if any(n is not None and n < 1 for n in counts):
            raise HFDError("pixels, steps and batches must be at least 1")
        self.device = sample.pick_device(args.device)
        self.model = hfd.load_model(args.model, self.device)
        self.last_level = len(self.model.autoencoder.lambdas)
        levels = getattr(args, "levels", [getattr(args, "level", 1)])
        if not 1 <= min(levels) <= max(levels) <= self.last_level:
            raise HFDError(f"{args.model}: has quality levels 1 to {self.last_level}")
        if not stage1:
            sample.need_diffusion(self.model)
        self._choose(scored)
        self.command = " ".join([parser.prog, *(Path(x).name for x in argv)])
        self._continue()

    def _choose(self, scored):
        """The pictures, and what can be measured on them."""
        self.names, self.images, self.distances = ["portrait"], [portrait()], {}
        if not scored:
            return
        count, middle = (2, 256) if self.args.quick else (None, self.args.middle)
        found = pictures(self.args.images, count, middle)
        self.names, self.images = map(list, zip(*found))
        stems = [Path(name).stem for name in self.names]
        self.kodak = stems == [f"kodim{n:02}" for n in range(1, 25)] and not (count or middle)
        for name, image in found:
            if min(image.size) < metrics.SIZE:
                raise HFDError(f"{name}: {image.width}x{image.height} pixels are too few, there "
                               f"must be {metrics.SIZE} a side; leave it out")
        try:
            self.distances, self.features = metrics.efficientnet(self.device)
        except HFDError as error:
            print(f"note: {error}; it is left out")
        self.numbers = ["fd", "psnr"] if self.distances else ["psnr"]

    def _continue(self):
        """Take over what an earlier run has measured, if all that the numbers depend on is the same
        (`about`). Folders are the user's own business, so of paths only the last part is kept."""
        args, model, self.points = self.args, self.model, {}
        weights = digest(*filter(None, (model.autoencoder, model.diffusion)))
        self.about = {
            "flags": {flag: value for flag, value in vars(args).items()
                      if flag in ("seed", "quick", "level")},
            "sampler": [hfd.STEPS, hfd.PATCH, hfd.CONTEXT, hfd.RELATIVE_ETA, hfd.WARP],
            "hardware": train.hardware(self.device), "torch": str(torch.__version__),
            "pillow": PIL.__version__, "distances": self.distances,
            "pictures": [self.names, digest(*(image.tobytes() for image in self.images))],
            "model": {"name": Path(args.model).name, "weights": weights}}
        os.makedirs(args.out, exist_ok=True)
        self.path = Path(args.out, args.name + ".json")
        own = digest(json.dumps(self.about).encode())[:8]               # for runs that differ
        self.partial = self.path.with_name(f"{args.name}.{own}.partial.json")
        for path in (self.path, self.partial):
            if path.exists() and not args.fresh:
                about, points = read_results(path)
                self.points |= points if about == self.about else {}
        if self.points:
            print(f"{len(self.points)} points are there from an earlier run; --fresh measures anew")

    def save(self, path, **more):
        """Write a JSON file: the command, what it depends on, `more`, and every point in a line."""
        minutes = round(sum(point["minutes"] for point in self.points.values()), 2)
        head = {"command": self.command, "minutes": minutes, "about": self.about, **more}
        points = [f"{json.dumps(key)}: {json.dumps(point)}" for key, point in self.points.items()]
        text = json.dumps(head, indent=1)[:-2] + ',\n "points": {\n' + ",\n".join(points) + "\n}}\n"
        hfd.write_atomically(path, lambda f: f.write(text.encode()))

    def finish(self, figure=None, **more):
        """Write NAME.png, of a matplotlib figure or PIL image if there is one, and NAME.json."""
        png = self.path.with_suffix(".png")
        if isinstance(figure, Image.Image):
            sample.save_picture(figure, png)
        elif figure:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            picture = Image.open(buffer).convert("RGB")
            if not any(panel.images for panel in figure.axes):
                picture = picture.quantize(64)              # enough for lines, in fewer bytes
            sample.save_picture(picture, png)
            plt.close(figure)
        self.save(self.path, **more)
        self.partial.unlink(missing_ok=True)
        print(f"wrote {f'{png} and ' if figure else ''}{self.path}")

    def timed(self, function, *args):
        """(function(*args), the seconds that it took)."""
        begin = sample.clock(self.device)
        result = function(*args)
        return result, sample.clock(self.device) - begin

    def point(self, key, compute):
        """compute(), a dictionary that JSON can hold, or what an earlier run got for this `key`."""
        if key not in self.points:
            result, seconds = self.timed(compute)
            self.points[key] = result | {"minutes": round(seconds / 60, 3)}
            self.save(self.partial)
            print(f"{key}: measured in {seconds:.1f} s", flush=True)
        return self.points[key]

    @functools.cached_property
    def reference(self):
        """The originals' features."""
        return [self.features(image) for image in self.images]

    def measure(self, key, code):
        """Code every picture and score what comes back: {variant: score}, kept as the point `key`.

        code(i, image) -> (bytes of the file, {variant: (decoded PIL image, {name: number})}) for
        picture number i; the numbers are seconds of parts, mostly. A score has means over pictures
        of these and of `bpp`, `psnr` in dB, `mse` on the scale 0..255, `colour` (how far the mean
        colour is off the original's in the worst channel), and metrics.realism if it can."""
        def compute():
            """All pictures, coded and scored."""
            rows = {}
            for i, image in enumerate(self.images):
                data, variants = code(i, image)
                for variant, (decoded, numbers) in variants.items():
                    error = np.subtract(decoded, image, dtype=float)                # (H, W, 3)
                    rows.setdefault(variant, []).append({
                        "bpp": 8 * len(data) / (image.width * image.height),
                        "psnr": metrics.psnr(image, decoded), "mse": np.square(error).mean(),
                        "colour": np.abs(error.mean(axis=(0, 1))).max(), **numbers,
                        "features": self.features(decoded) if self.distances else {}})
            return {"variants": {variant: self._score(each) for variant, each in rows.items()}}
        return self.point(key, compute)["variants"]

    def _score(self, rows):
        """One variant's score."""
        each = {name: [row[name] for row in rows] for name in rows[0]}
        features = each.pop("features")
        score = {name: round(np.mean(values).item(), 5) for name, values in each.items()}
        return score | (metrics.realism(self.reference, features) if self.distances else {})

    @functools.cache
    def coded(self, level, i):
        """(bytes, x_hat): picture number i's file at quality `level`, 1 .. Q, and what its
        autoencoder decodes, (1, 3, H', W')."""
        data, _ = sample.compress(self.images[i], self.model, level, self.args.seed + i)
        header = sample.parse(data, self.names[i])
        k, _ = sample.decode_latent(header, self.model, self.names[i])
        return data, sample.with_mean(self.model.autoencoder.decode(k, level - 1), header)

    def sample(self, level, i, diffusion=None, seed=0, **settings):
        """What HFD draws from that file, (1, 3, H', W'), as sample.decompress does. diffusion: None
        for the model's. seed: added to the file's. settings: those of hfd.sample_picture."""
        data, x_hat = self.coded(level, i)
        header = sample.parse(data, self.names[i])
        x = hfd.sample_picture(diffusion or self.model.diffusion, x_hat, level - 1,
                               seed=header["seed"] + seed, **settings)
        return sample.with_mean(x, header)

    def drawn(self, key, level, draw):
        """{variant: score} of draw(i, x_hat) -> {variant: x (1, 3, H', W')}, the point `key`."""
        def code(i, image):
            """Picture i's file, and its sample."""
            data, x_hat = self.coded(level, i)
            shown, seconds = self.timed(draw, i, x_hat)
            return data, {variant: (sample.to_image(x, *image.size), {"diffusion": seconds})
                          for variant, x in shown.items()}
        return self.measure(key, code)

    def sampled(self, key, level, diffusion=None, **settings):
        """The score of HFD at quality `level`, as `sample` draws it. The weights of another
        denoiser than the model's become part of the key."""
        if diffusion not in (None, self.model.diffusion):
            key += f" ({digest(diffusion)[:8]})"
        return self.drawn(key, level, lambda i, x_hat: {
            "HFD": self.sample(level, i, diffusion, **settings)})["HFD"]

    def blurry(self, level):
        """The score of the autoencoder alone at quality `level`."""
        return self.drawn(f"autoencoder, level {level}", level,
                          lambda i, x_hat: {"autoencoder": x_hat})["autoencoder"]

    def other(self, folder):
        """Another model with the same autoencoder. HFDError if it is none."""
        model = hfd.load_model(folder, self.device)
        if model.identity != self.model.identity or not model.diffusion:
            raise HFDError(f"{folder}: has no denoiser for the autoencoder in {self.args.model}; "
                           "copy that there, and train stage 2 beside it")
        return model

    def compare(self, what, a, b):
        """Score a over score b, told and returned: distances as [ratio, low, high], `db` of
        PSNR."""
        found = {name: metrics.ratio(a, b, name) for name in self.distances}
        told = ["{} {:.1f} / {:.1f} = {:.3f} [{:.3f}, {:.3f}]".format(name, a[name], b[name], *over)
                for name, over in found.items()]
        found["db"] = round(a["psnr"] - b["psnr"], 3)
        print(f"{what}: " + ", ".join(told + [f"PSNR {a['psnr']:.2f} dB ({found['db']:+.2f})"]))
        return found


# Plots --------------------------------------------------------------------------------------------
# The palette of Okabe & Ito (2008), which colour-blind readers can tell apart, and markers.
LOOK = {"HFD": ("#D55E00", "o"), "autoencoder": ("#0072B2", "s"), "AVIF": ("#009E73", "^"),
        "WebP": ("#CC79A7", "D"), "JPEG 2000": ("#E69F00", "v"), "JPEG": ("#000000", "x"),
        "factorized prior": ("#56B4E9", "P"), "HFD+": ("#D55E00", "*", ":")}
CYCLE = list(LOOK.values())
GREY = "#777777"
STYLE = {"figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 9,
         "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
         "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.markersize": 4.5}
# How a number of a score is drawn.
AXES = {"psnr": dict(title="Distortion: up is nearer to the original", ylabel="PSNR (dB)"),
        "fd": dict(title="Realism: down is more like photographs", ylabel="Fréchet distance",
                   yscale="log"),
        "diffusion": dict(title="Cost: time per picture", ylabel="seconds", yscale="log")}


def axes(columns=1, width=4.3, height=3.9, rows=1):
    """A matplotlib figure and a list of its axes, row by row. Inches per panel."""
    plt.rcParams.update(STYLE)
    size = columns * width, rows * height
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    return figure, list(panels.flat)


def line(name, points, number, look):
    """What `plot` takes, of {x: score}."""
    return name, list(points), [score[number] for score in points.values()], look


def plot(panel, lines, ticks=None, **labels):
    """Draw lines, each (name, x, y, (colour, marker[, style])), and name them where they end.
    ticks: of the x axis, a list or {place: text}. labels: what matplotlib's `set` takes."""
    for _, x, y, (colour, marker, *style) in lines:
        panel.plot(x, y, *style, color=colour, marker=marker, linewidth=1.6 if marker else 0.9)
    panel.set(**labels)
    if ticks:
        ticks = ticks if isinstance(ticks, dict) else {tick: f"{tick:g}" for tick in ticks}
        panel.set_xticks(list(ticks), ticks.values())
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if labels.get("yscale") == "log":                       # numbers that people can read
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    panel.autoscale_view()                                  # which would wait until all is drawn
    # A column of names to the right: each at its line's height, or just above the name below, but
    # leaving room for those that follow.
    gap, height, to_panel = 0.045, -1, panel.transData + panel.transAxes.inverted()
    ends = [(to_panel.transform((x[-1], y[-1]))[1], n) for n, (_, x, y, _) in enumerate(lines)]
    for i, (own, n) in enumerate(sorted(ends)):
        name, x, y, (colour, *_) = lines[n]
        height = min(max(own, height + gap), 1 - gap * (len(ends) - 1 - i))
        panel.annotate(name, (x[-1], y[-1]), (1.03, height), textcoords="axes fraction", fontsize=8,
                       color=colour, va="center", arrowprops={"arrowstyle": "-", "color": colour,
                                                              "linewidth": 0.4, "relpos": (0, 0.5)})


RIBBONS = (325, 440, 453, 552)          # of the portrait: dark cloth and fine colours


def contact_sheet(pictures, view=(0, 0, 512, 600)):
    """Of pictures of the portrait, each (caption, PIL image), the box `view`, side by side, and
    below each its RIBBONS, enlarged to the same width."""
    width, columns = view[2] - view[0], []
    for caption, image in pictures:
        top, below = (ImageOps.scale(image.crop(box), width // (box[2] - box[0]), Image.NEAREST)
                      for box in (view, RIBBONS))
        column = ImageOps.expand(top, (0, 30, 8, 8 + below.height), "white")
        ImageDraw.Draw(column).text((4, 3), caption, "black", ImageFont.load_default(20))
        column.paste(below, (0, 38 + top.height))
        columns.append(np.asarray(column))
    return Image.fromarray(np.hstack(columns)[:, :-8])


def sheet(columns, rows):
    """PIL pictures of one size, {caption: [one for each of the names in rows]}, as one picture."""
    (w, h), gap, font = next(iter(columns.values()))[0].size, 4, ImageFont.load_default(16)
    whole = Image.new("RGB", (len(columns) * (w + gap) - gap, 24 + len(rows) * (h + gap)), "white")
    pen = ImageDraw.Draw(whole)
    for i, (caption, column) in enumerate(columns.items()):
        pen.text((i * (w + gap) + 2, 1), caption, "black", font)
        for j, picture in enumerate(column):
            whole.paste(picture, (i * (w + gap), 24 + j * (h + gap)))
    for j, name in enumerate(rows):
        pen.text((5, 27 + j * (h + gap)), name, "white", font, stroke_width=2, stroke_fill="black")
    return whole
