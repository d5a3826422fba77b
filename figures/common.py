"""What the scripts of all figures share: pictures, a run that can be stopped and continued, one style of plot.

A script makes a `Run` from its flags, measures one point after another, draws, and calls `finish`. Every point is saved as soon as it
is there, so the same command, started again, goes on where the last one stopped.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import torch
from matplotlib import pyplot as plt
from PIL import Image

import hfd
import sample
import train
from figures import metrics
from hfd import HFDError

matplotlib.use("Agg")       # draw into files, whether there is a screen or not


def pictures(folder=None, count=None, middle=None):
    """[(name, PIL RGB image)]: the pictures in a folder and those below it, by name, or if None what is at hand: the portrait
    that ships with matplotlib and three dead leaves pictures. count: take only so many, evenly spread. middle: of
    each only the square of that side around its centre.
    HFDError if there are none, or if one cannot be read: a mean over those that can would compare with nothing."""
    pick = lambda items: [items[n * len(items) // count] for n in range(count)] if count and count < len(items) else items
    if folder is None:
        from matplotlib.cbook import get_sample_data
        with get_sample_data("grace_hopper.jpg") as f:
            found = [("grace_hopper", sample.open_picture(f)[0])]
        rng = np.random.default_rng(20230518)   # not a seed of train.py's: these pictures must not be among those it draws
        found = pick(found + [(f"dead_leaves_{i}", Image.fromarray(train.dead_leaves(256, rng))) for i in (1, 2, 3)])
    else:
        paths = train.picture_files(folder)
        if not paths:
            raise HFDError(f"{folder}: no pictures found in it. Give --images a folder of pictures, or leave it out")
        found = [(p.stem, sample.open_picture(p)[0]) for p in pick(paths)]
    if middle:
        found = [(name, around_centre(image, middle)) for name, image in found]
    return found


def around_centre(image, side):
    """The middle of a PIL picture, at most side x side pixels."""
    w, h = min(image.width, side), min(image.height, side)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def detail(image, box):
    """`box` (left, top, right, bottom) where it lies within a PIL picture, such as the portrait that it was chosen for; else as much
    of that size as there is in the upper left corner."""
    inside = box[2] <= image.width and box[3] <= image.height
    return box if inside else (0, 0, min(box[2] - box[0], image.width), min(box[3] - box[1], image.height))


def timed(function, *args):
    """(function(*args), the seconds that it took). A GPU works behind Python's back, so it is waited for."""
    device = hfd.pick_device()
    begin = hfd.clock(device)
    result = function(*args)
    return result, hfd.clock(device) - begin


# ------------------------------------------------------------------------------------------------------
# A run and its results
# ------------------------------------------------------------------------------------------------------

# Flags that several scripts have, with their types and meanings. Each script says which of them it takes, and with what default.
FLAGS = {"level": dict(type=int, help="quality level of the model"),
         "levels": dict(type=int, nargs="+", help="quality levels of the model"),
         "steps": dict(type=int, help="denoising steps"),
         "eta": dict(type=float, help="of the sampler's schedule; by default the level's own")}


class Run:
    """One run of the script figures/NAME.py. What it needs: `args`, `device`, `model` (hfd.Model), `names` and `images` (PIL RGB),
    `features` (a feature set of metrics.py, called `feature_name`; None where its packages are missing), `numbers` (what there is to plot:
    "fd", if there are features, and "psnr"), and `kodak`: whether these are the 24 Kodak pictures, the only ones for which published
    numbers hold.

    argv: None for the command line's. defaults: of those of FLAGS that the script takes. add_flags(parser): adds flags that no other
    script has. needs_diffusion: whether a checkpoint of stage 1 alone is refused. HFDError for what a user can mend."""

    def __init__(self, name, description, argv=None, add_flags=lambda parser: None, needs_diffusion=True, **defaults):
        parser = argparse.ArgumentParser(prog=f"python -m figures.{name}", description=description.split("\n")[0],
                                         formatter_class=sample.Help)
        parser.add_argument("--images", metavar="DIR", help="folder of pictures to measure on; without it: a portrait and dead leaves")
        parser.add_argument("--pictures", type=int, metavar="N", help="only so many of them, evenly spread")
        parser.add_argument("--middle", type=int, metavar="SIDE", help="only the middle of each, a square of so many pixels a side")
        parser.add_argument("--model", metavar="FILE", default=sample.MODEL, help="checkpoint")
        parser.add_argument("--out", metavar="DIR", default="runs/figures", help="folder for its .png and .json")
        parser.add_argument("--name", default=name, help="what those two are called, without their endings")
        parser.add_argument("--quick", action="store_true", help="the middle of two pictures, and fewer points: does it work?")
        parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run of this command has measured")
        parser.add_argument("--seed", type=sample.seed_number, default=0, help="seed of everything random")
        parser.add_argument("--inception", metavar="FILE", help="inception-2015-12-05.pt: FID/256 instead of FD-EfficientNet")
        parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
        for flag, default in defaults.items():
            parser.add_argument(f"--{flag}", default=default, **FLAGS[flag])
        add_flags(parser)
        argv = sys.argv[1:] if argv is None else argv
        self.args, self.begin = parser.parse_args(argv), time.time()
        if any((value := getattr(self.args, flag, None)) is not None and value < 1 for flag in ("pictures", "middle", "steps")):
            raise HFDError("--pictures, --middle and --steps must be at least 1")
        if self.args.quick:
            self.args.pictures, self.args.middle = 2, 256
        self.name = self.args.name
        self.device = hfd.pick_device(self.args.device)
        self.model = hfd.load_model(self.args.model, self.device)
        if needs_diffusion:
            sample.need_diffusion(self.model)
        levels, last = getattr(self.args, "levels", [getattr(self.args, "level", 1)]), len(self.model.autoencoder.config.lambdas)
        if not all(1 <= level <= last for level in levels):
            raise HFDError(f"{self.args.model}: has quality levels 1 to {last}, and no others")
        self.names, self.images = zip(*pictures(self.args.images, self.args.pictures, self.args.middle))
        self.kodak = len(self.names) == 24 and all(n.startswith("kodim") and {*image.size} == {512, 768} for n, image in zip(self.names, self.images))
        self.feature_name = self.features = None
        if self.args.inception:
            self.feature_name, self.features = metrics.inception(self.args.inception, self.device)
        else:
            try:
                self.feature_name, self.features = metrics.efficientnet(self.device)
            except HFDError as error:
                print(f"note: {error}. Frechet distances are left out.")
        self.numbers = ["fd", "psnr"] if self.features else ["psnr"]
        self.reference = [self.features(image) for image in self.images] if self.features else None

        # What the numbers depend on. An earlier run's points are taken over only if all of this was the same. Folders are the
        # reader's own business: no path is kept but for its last part.
        digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
        files = ("images", "pictures", "middle", "model", "out", "name", "fresh", "inception", "device")
        keyed = ("levels", "refine", "most", "megapixels", "flow", "retrained")     # these choose points, and each point's key says so
        last = lambda word: [last(w) for w in word] if isinstance(word, list) else Path(word).name if isinstance(word, str) else word
        self.about = {
            "flags": {flag: last(value) for flag, value in vars(self.args).items() if flag not in files + keyed},
            "sampler": {"steps": hfd.STEPS, "patch": hfd.PATCH, "context": hfd.CONTEXT, "relative eta": hfd.RELATIVE_ETA},
            "hardware": hfd.hardware(self.device), "torch": str(torch.__version__), "pillow": PIL.__version__,
            "pictures": {"names": list(self.names), "sha256": digest(b"".join(image.tobytes() for image in self.images))},
            "model": {"file": Path(self.args.model).name, "autoencoder": self.model.identity.hex(), "weights": hfd.fingerprint(
                *(module.state_dict() for module in (self.model.autoencoder, self.model.diffusion) if module)).hex()[:16]},
            "features": self.feature_name}
        self.command = " ".join([parser.prog] + last(argv))
        os.makedirs(self.args.out, exist_ok=True)
        own = digest(json.dumps(self.about).encode())[:8]       # runs that differ do not take each other's unfinished work
        self.path, self.partial = (Path(self.args.out, self.name + end) for end in (".json", f".{own}.partial.json"))
        self.points, self._coded = {}, {}
        for path in (self.path, self.partial):
            if path.exists() and not self.args.fresh:
                stored = json.loads(path.read_text())
                if stored.get("about") == json.loads(json.dumps(self.about)):
                    self.points |= stored["points"]
        if self.points:
            print(f"{len(self.points)} points are there from an earlier run; --fresh measures them again")

    def _save(self, path, **more):
        minutes = round(sum(point["minutes"] for point in self.points.values()) or (time.time() - self.begin) / 60, 2)
        head = json.dumps({"command": self.command, "minutes": minutes, "about": self.about, **more}, indent=1)
        points = ",\n".join(f"  {json.dumps(key)}: {json.dumps(point)}" for key, point in self.points.items())     # a line each
        text = head[:-2] + ',\n "points": {\n' + points + "\n }\n}\n"
        hfd.write_atomically(str(path), lambda f: f.write(text.encode()))

    def point(self, key, compute):
        """compute(), a dictionary that JSON can hold, or what an earlier run got for this `key`."""
        if key not in self.points:
            result, seconds = timed(compute)
            self.points[key] = result | {"minutes": round(seconds / 60, 3)}
            self._save(self.partial)
            print(f"{key}: measured in {seconds:.1f} s", flush=True)
        return self.points[key]

    def measure(self, key, code):
        """Code every picture and score what comes back: {variant: numbers}, kept as the point `key`.

        code(i, image) -> (bytes of the file, {variant: (decoded PIL image, {part: seconds})}) for picture number i; a third entry of a
        variant may hold more numbers by name. Results are means over pictures, `bpp`, `psnr` in dB, `seconds` by part, those
        numbers, and metrics.realism if there are features; and one by one bpp_each, psnr_each and rgb_each, the
        decoded picture's mean colour, 0 .. 255."""
        def compute():
            """Every picture there and back, and the scores of each variant."""
            rows = {}
            for i, image in enumerate(self.images):
                data, variants = code(i, image)
                for variant, (decoded, seconds, *more) in variants.items():
                    rows.setdefault(variant, []).append((
                        round(8 * len(data) / (image.width * image.height), 5), round(sample.psnr(image, decoded), 4),
                        np.asarray(decoded).mean(axis=(0, 1)).round(4).tolist(), seconds, self.features and self.features(decoded), (more or [{}])[0]))
                self.progress(key, i)
            return {"variants": {variant: self._score(*zip(*row)) for variant, row in rows.items()}}
        return self.point(key, compute)["variants"]

    def progress(self, key, i):
        """Say on a terminal that picture number i of point `key` is done, and how long the others will take."""
        if i == 0:
            self._mark = time.time()
        elif sys.stderr.isatty():
            left = (time.time() - self._mark) / i * (len(self.images) - i - 1)
            sys.stderr.write(f"\r{key}: picture {i + 1}/{len(self.images)}, {left:.0f} s left \033[K\r")

    def coded(self, level, i):
        """(bytes, x_hat): the file of picture number i at quality `level`, 1 .. Q, and what its autoencoder decodes, (1, 3, H', W')."""
        if (level, i) not in self._coded:
            data, _ = sample.compress(self.images[i], self.model, level, self.args.seed + i)
            k, _ = sample.decode_latent(sample.parse(data, self.names[i]), self.model, self.names[i])
            self._coded[level, i] = data, self.model.autoencoder.decode(k, level - 1)
        return self._coded[level, i]

    def other(self, path):
        """The diffusion model in another checkpoint. HFDError if its autoencoder is not the model's."""
        model = hfd.load_model(path, self.device)
        if model.identity != self.model.identity or not model.diffusion:
            raise HFDError(f"{path}: not a diffusion model for the autoencoder of {self.args.model}. Train it on that one (--autoencoder)")
        return model.diffusion

    def sampled(self, key, level, diffusion=None, **settings):
        """The score of HFD at quality `level`, kept as the point `key`. settings: those of hfd.sample_picture that are not to be its
        defaults. diffusion: another one than the model's; its fingerprint becomes part of the key."""
        if diffusion not in (None, self.model.diffusion):
            key += f" ({hfd.fingerprint(diffusion.state_dict()).hex()[:8]})"

        def code(i, image):
            """Picture i's file, and its sample under these settings."""
            data, x_hat = self.coded(level, i)
            x, seconds = timed(lambda: hfd.sample_picture(diffusion or self.model.diffusion, x_hat, level - 1, seed=self.args.seed + i, **settings))
            return data, {"HFD": (sample.to_image(x, *image.size), {"diffusion": seconds})}
        return self.measure(key, code)["HFD"]

    def blurry(self, level):
        """The score of the autoencoder alone at quality `level`, kept as a point."""
        def code(i, image):
            """Picture i's file, and the autoencoder's picture alone."""
            data, x_hat = self.coded(level, i)
            return data, {"autoencoder": (sample.to_image(x_hat, *image.size), {})}
        return self.measure(f"autoencoder, level {level}", code)["autoencoder"]

    def _score(self, bpp, psnr, rgb, seconds, features, more):
        return {"bpp": float(np.mean(bpp)), "psnr": float(np.mean(psnr)),
                "seconds": {part: round(float(np.mean([s[part] for s in seconds])), 5) for part in seconds[0]},
                **{name: round(float(np.mean([numbers[name] for numbers in more])), 5) for name in more[0]},
                **(metrics.realism(self.reference, features) if self.features else {}),
                "bpp_each": bpp, "psnr_each": psnr, "rgb_each": rgb}

    def finish(self, figure, **more):
        """Write NAME.png from a matplotlib figure or PIL image, and NAME.json: command, minutes, hardware, `more` and every point."""
        png = Path(self.args.out, self.name + ".png")
        if isinstance(figure, Image.Image):
            sample.save_picture(figure, str(png))
        else:
            hfd.write_atomically(str(png), lambda f: figure.savefig(f, format="png"))
            plt.close(figure)
        self._save(self.path, **more)
        self.partial.unlink(missing_ok=True)
        print(f"wrote {png} and {self.path}")


# ------------------------------------------------------------------------------------------------------
# Plots
# ------------------------------------------------------------------------------------------------------

# The palette of Okabe & Ito (2008), which colour-blind readers can tell apart; and a marker each, for print without colour.
LOOK = {"HFD": ("#D55E00", "o"), "autoencoder": ("#0072B2", "s"), "AVIF": ("#009E73", "^"), "WebP": ("#CC79A7", "D"),
        "JPEG 2000": ("#E69F00", "v"), "JPEG": ("#000000", "x")}
CYCLE = list(LOOK.values())
GREY = "#777777"            # for what others have published
TITLES = {"psnr": "Distortion: up is nearer to the original", "fd": "Realism: down is more like photographs", "seconds": "Cost: time per picture"}
STYLE = {"figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5,
         "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 4.5}


def axes(columns=1, width=4.3, height=3.9, rows=1):
    """A matplotlib figure and a list of its axes, row by row, in the style of all figures. Inches per panel."""
    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False)
    return figure, list(panels.flat)


def label_ends(panel, ends):
    """Name lines directly, so that no legend is needed: a column of names to the right of the panel, each led to where its line
    ends. ends: [(x, y, text, colour)], in data units. Call it last, when the limits of the axes are set."""
    gap = 0.04                                              # between names, in heights of the panel
    panel.autoscale_view()                                  # matplotlib would leave it until it draws
    to_panel = panel.transData + panel.transAxes.inverted()
    ends = sorted((to_panel.transform((x, y))[1], x, y, text, colour) for x, y, text, colour in ends)
    height = -gap
    for i, (own, x, y, text, colour) in enumerate(ends):    # upwards: at its line's height, or just above the name below, but
        height = min(max(own, height + gap), 1 - gap * (len(ends) - 1 - i))     # leaving room for those that follow
        panel.annotate(text, (x, y), (1.03, height), textcoords="axes fraction", color=colour, va="center", fontsize=8,
                       arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkB": 3, "relpos": (0, 0.5)})


def plain_log_ticks(panel):
    """Numbers that people can read on a logarithmic y axis."""
    panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def curves(panel, run, number, lines, xlabel, ticks, xscale="log", ends=()):
    """Draw a panel that shows `number` ("psnr", "fd" or "seconds") over something with these ticks, with title, axes and line names.
    lines: {name: (colour, marker, line style, {x: score, as Run.measure returns it})}. ends: of what is drawn already."""
    ends = list(ends)
    for name, (colour, marker, style, points) in lines.items():
        y = [score["seconds"]["diffusion"] if number == "seconds" else score[number] for score in points.values()]
        panel.plot(list(points), y, color=colour, marker=marker, linestyle=style)
        ends.append((list(points)[-1], y[-1], name, colour))
    label = {"psnr": "PSNR (dB)", "fd": f"{run.feature_name} (Fréchet distance)", "seconds": "seconds"}[number]
    panel.set(title=TITLES[number], ylabel=label, xlabel=xlabel, xscale=xscale, yscale="linear" if number == "psnr" else "log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    if number == "fd":
        plain_log_ticks(panel)
    label_ends(panel, ends)
