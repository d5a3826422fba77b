"""Rate against distortion, and rate against realism: the autoencoder, HFD, HFD+, other codecs.

    python -m figures.rate_distortion --images KODAK --factorized runs/factorized --out figures

Rates are those of complete files. What the context model is worth is the gap to a factorized prior
on the same transforms (train.py autoencoder --init checkpoints --prior factorized).
"""
from functools import partial

import numpy as np
import torch

import hfd
import sample
from figures import codecs, common, metrics
from hfd import HFDError

FACTORIZED = "factorized prior"


def ours(run, model, level, block, variants, i, image):
    """Picture i's file, with an HFD+ map in blocks of that side or, if 0, without, and what it
    decodes to with each rho of variants, {name: rho}."""
    data, report = sample.compress(image, model, level, run.args.seed + i, block)
    shown = {}
    for name, rho in variants.items():
        decoded, decoding = sample.decompress(data, model, run.names[i], rho)
        shown[name] = decoded, report["seconds"] | decoding["seconds"]
    return data, shown


def theirs(run, name, setting, i, image):
    """Picture i's file in one of codecs.CODECS, and what it decodes to."""
    data, encoding = run.timed(codecs.encode, name, image, setting)
    decoded, decoding = run.timed(codecs.decode, data)
    return data, {name: (decoded, {"encoder": encoding, "decoder": decoding})}


def measure(run):
    """All curves: {name: {setting: score}}, from low rates to high ones."""
    curves, other = {}, None
    quick, diffusion = run.args.quick, run.model.diffusion
    if run.args.factorized:
        other = hfd.load_model(run.args.factorized, run.device)
        a, b = ([*coder.analysis.parameters(), *coder.synthesis.parameters()]
                for coder in (run.model.autoencoder, other.autoencoder))
        if not all(map(torch.equal, a, b)):                 # as numbers: averaging turns -0 into 0
            raise HFDError(f"{run.args.factorized}: has other transforms than {run.args.model}; "
                           "make it by train.py autoencoder --init MODEL --prior factorized")

    def add(setting, key, code, *how):
        """Measure one setting of code, `ours` or `theirs`, and add it to its curves."""
        for name, score in run.measure(key, partial(code, run, *how)).items():
            curves.setdefault(name, {})[setting] = score
    for name, (_, settings) in codecs.CODECS.items():
        for setting in settings[::3 if quick else 1]:
            add(setting, f"{name} {setting}", theirs, name, setting)
    for level in range(1, run.last_level + 1, 2 if quick else 1):
        variants = {"autoencoder": 0, "HFD": 1} if diffusion else {"autoencoder": 0}
        add(level, f"level {level}", ours, run.model, level, 0, variants)
        if diffusion and diffusion.config.kind == "plus":
            block = sample.PLUS_BLOCK
            add(level, f"level {level}, HFD+", ours, run.model, level, block, {"HFD+": 1})
        if other:
            key = f"level {level}, {FACTORIZED} {other.identity.hex()}"
            add(level, key, ours, other, level, 0, {FACTORIZED: 0})
    return curves


def bits_against_others(run, curves):
    """{what: {codec: % of bits}}: what our curves need more (+) or less (-) at equal quality."""
    found = {}
    for number in ["psnr", *run.distances]:
        def quality(score):
            """Less distance is more of it, and equal ratios of distance count the same."""
            return score["psnr"] if number == "psnr" else -np.log(score[number])
        points = {name: [(score["bpp"], quality(score)) for score in curve.values()]
                  for name, curve in curves.items()}
        points |= codecs.PUBLISHED if number == "psnr" and run.kodak else {}
        for name in filter(curves.get, ("autoencoder", "HFD", "HFD+", FACTORIZED)):
            found[f"% of bits of {name} at equal {number}, relative to"] = {
                other: metrics.bd_rate(*zip(*points[other]), *zip(*points[name]))
                for other in points if other != name}
    return found


def report(run, curves):
    """Print all points, and what they say in single numbers, which are returned."""
    for name, points in curves.items():
        for setting, score in points.items():
            numbers = [f"{what} {n:.4g}" for what, n in score.items() if np.isscalar(n)]
            print(f"{name} {setting}: {', '.join(numbers)}")
    summary = bits_against_others(run, curves)
    for what, found in summary.items():
        print(what, found)
    pairs = ("HFD", "autoencoder"), ("HFD+", "autoencoder"), ("autoencoder", FACTORIZED)
    for name, other in pairs:
        for level in curves.get(name, {}) if other in curves else ():
            a, b = curves[name][level], curves[other][level]
            what, bits = f"level {level}, {name} over {other}", round(a["bpp"] / b["bpp"], 4)
            summary[what] = run.compare(f"{what}: bits {bits:.3f}", a, b) | {"bits": bits}
    return summary


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("rate_distortion", __doc__, argv, stage1=True, factorized=None)
    curves = measure(run)
    summary = report(run, curves)
    figure, panels = common.axes(len(run.numbers))
    for panel, number in zip(panels, run.numbers[::-1]):
        lines = []
        if number == "psnr" and run.kodak:
            lines = [(name, *zip(*points), (common.GREY, "", "--"))
                     for name, points in codecs.PUBLISHED.items()]
        for name, points in curves.items():
            if number == "fd" and name == FACTORIZED:       # whose pictures are the autoencoder's
                continue
            look, points = common.LOOK[name], {score["bpp"]: score for score in points.values()}
            lines.append(common.line(name, points, number, look))
            if number == "fd":
                low, high = zip(*(score["fd_interval"] for score in points.values()))
                panel.fill_between(list(points), low, high, color=look[0], alpha=0.12, linewidth=0)
        common.plot(panel, lines, (0.05, 0.1, 0.2, 0.5, 1), xscale="log", **common.AXES[number],
                    xlabel="bits per pixel, complete file")
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    sample.run(main)
