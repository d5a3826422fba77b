"""Rate against distortion, and rate against realism: the autoencoder, HFD, and other codecs.

    python -m figures.rate_distortion --images KODAK --factorized runs/factorized --out figures

Rates are those of complete files. What the context model is worth is the gap to a factorized prior
on the same transforms: train.py autoencoder --init checkpoints --prior factorized --out ... trains
one.
"""
import numpy as np
import torch

import hfd
import sample
from figures import codecs, common, metrics
from hfd import HFDError

FACTORIZED = "factorized prior"


def ours(run, model, level, variants):
    """As Run.measure needs it. variants: {name: rho}.

    `back`: the share of the latent's non-zero symbols that return when the decoded picture is
    encoded again. An ideal conditional sampler would return all: the file says something about the
    picture, and a true sample agrees with what the file says (Xu et al. 2024)."""
    def encode(image):
        """The latent (1, M, h, w)."""
        return model.autoencoder.encode(sample.to_tensor(image, run.device), level - 1)

    def code(i, image):
        data, report = sample.compress(image, model, level, run.args.seed + i)
        k, shown = encode(image), {}
        for name, rho in variants.items():
            decoded, decoding = sample.decompress(data, model, run.names[i], rho)
            back = (encode(decoded) == k)[k != 0].float().mean().nan_to_num(1).item()
            shown[name] = decoded, report["seconds"] | decoding["seconds"] | {"back": back}
        return data, shown
    return code


def theirs(run, name, setting):
    """As Run.measure needs it, of one of codecs.CODECS."""
    def code(i, image):
        data, encoding = run.timed(codecs.encode, name, image, setting)
        decoded, decoding = run.timed(codecs.decode, data)
        return data, {name: (decoded, {"encoder": encoding, "decoder": decoding})}
    return code


def with_same_transforms(run, folder):
    """The model in a folder. HFDError if it differs from the run's in more than its prior."""
    other = hfd.load_model(folder, run.device)
    a, b = ([t for name, t in model.autoencoder.state_dict().items() if "prior" not in name]
            for model in (run.model, other))
    if len(a) != len(b) or not all(map(torch.equal, a, b)):
        raise HFDError(f"{folder}: has other transforms or steps than {run.args.model}; make it by "
                       "train.py autoencoder --init MODEL --prior factorized")
    return other


def measure(run):
    """All curves: {name: {setting: score}}, from low rates to high ones."""
    curves, few = {}, 3 if run.args.quick else 1
    other = run.args.factorized and with_same_transforms(run, run.args.factorized)

    def add(setting, key, code):
        """One point of the curves that it is on."""
        for name, score in run.measure(key, code).items():
            curves.setdefault(name, {})[setting] = score
    for name, (_, settings) in codecs.CODECS.items():
        for setting in settings[::few]:
            add(setting, f"{name} {setting}", theirs(run, name, setting))
    for level in range(1, run.last_level + 1, few - few // 2):
        variants = {"autoencoder": 0, "HFD": 1} if run.model.diffusion else {"autoencoder": 0}
        add(level, f"level {level}", ours(run, run.model, level, variants))
        if other:
            key = f"level {level}, {FACTORIZED} {other.identity.hex()}"
            add(level, key, ours(run, other, level, {FACTORIZED: 0}))
    return curves


def report(run, curves):
    """Print all points, and what they say in single numbers, which are returned."""
    columns = ["bpp", "psnr", *run.distances, "colour", "back", "encoder", "range encoder",
               "decoder", "range decoder", "diffusion"]
    print(f"{'codec':>16} {'setting':>7}", *(f"{column:>13}" for column in columns))
    for name, points in curves.items():
        for setting, score in points.items():
            numbers = (f"{score.get(column, 0):13.4f}" for column in columns)
            print(f"{name:>16} {setting:7}", *numbers)
    summary = {}
    for number in ["psnr", *run.distances]:
        # Less distance is more quality, and equal ratios of it count the same.
        points = {name: [(score["bpp"], score[number] if number == "psnr" else -np.log(
            score[number])) for score in curve.values()] for name, curve in curves.items()}
        if number == "psnr" and run.kodak:
            points |= {name: points for name, (_, points) in codecs.PUBLISHED.items()}
        for name in filter(curves.get, ("autoencoder", "HFD", FACTORIZED)):
            found = summary[f"% of bits of {name} at equal {number}, relative to"] = {}
            for other in points:
                try:
                    bits = round(metrics.bd_rate(*zip(*points[other]), *zip(*points[name])), 1)
                except ValueError:
                    bits = None                             # no quality in common
                found |= {other: bits} if other != name else {}
    for what, found in summary.items():
        print(what, found)
    for name, other in (("HFD", "autoencoder"), ("autoencoder", FACTORIZED)):
        for level in curves.get(name, {}) if other in curves else ():
            a, b = curves[name][level], curves[other][level]
            what, bits = f"level {level}, {name} over {other}", round(a["bpp"] / b["bpp"], 4)
            summary[what] = run.compare(f"{what}: bits {bits:.3f}", a, b) | {"bits": bits}
    return summary


def main(argv=None):
    """Measure, print, draw."""
    run = common.Run("rate_distortion", __doc__, argv, stage1=True, factorized=None)
    curves = measure(run)
    summary = report(run, curves)
    figure, panels = common.axes(len(run.numbers))
    for panel, number in zip(panels, run.numbers[::-1]):
        lines = []
        if number == "psnr" and run.kodak:
            lines = [(name, *zip(*points), (common.GREY, "", "--"))
                     for name, (_, points) in codecs.PUBLISHED.items()]
        for name, points in curves.items():
            look, points = common.LOOK[name], {score["bpp"]: score for score in points.values()}
            if number == "psnr" or name != FACTORIZED:      # which draws the same pictures
                lines.append(common.line(name, points, number, look))
            if number == "fd":
                low, high = zip(*(score["fd_interval"] for score in points.values()))
                panel.fill_between(list(points), low, high, color=look[0], alpha=0.12, linewidth=0)
        common.draw(panel, lines, (0.05, 0.1, 0.2, 0.5, 1), xscale="log", **common.AXES[number],
                    xlabel="bits per pixel, complete file")
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    sample.run(main)
