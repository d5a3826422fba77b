"""Is the HFD+ map worth its bits? Files with and without it, by block size, at every level: bits, Frechet distance, PSNR.

    python -m figures.hfd_plus --images KODAK --out figures

A map costs bits, and so does the next better level. It is worth them if a point with a map lies below the line through the points without.
"""
import numpy as np

import hfd
import sample
from figures import common

BLOCKS = (0, 128, 64, 32, 16)


def coded(run, level, block):
    """The `code` of common.Run.measure: compress with a map in blocks of that side, 0 for none, and decode."""
    def code(i, image):
        """Picture i's file with such a map, decoded with all defaults."""
        data, _ = sample.compress(image, run.model, level, run.args.seed + i, block)
        decoded, report = sample.decompress(data, run.model, run.names[i])
        return data, {"HFD": (decoded, report["seconds"])}
    return code


def main(argv=None):
    """Measure, compare at equal bits, draw."""
    run = common.Run("hfd_plus", __doc__, argv, levels=[1, 2, 3])
    curves = {block: [run.measure(f"level {level}, block {block}", coded(run, level, block))["HFD"] for level in run.args.levels]
              for block in (BLOCKS[::3] if run.args.quick else BLOCKS)}
    plain, summary = curves[0], []
    for block, points in curves.items():
        for level, base, point in zip(run.args.levels, plain, points):
            row = {"level": level, "block": block, "extra_bpp": round(point["bpp"] - base["bpp"], 5)}
            for n in run.numbers:   # at equal bits: against the line through the files without a map
                line = np.interp(np.log(point["bpp"]), np.log([p["bpp"] for p in plain]), [p[n] for p in plain])
                row |= {n: round(point[n], 3), n + "_without_at_equal_bpp": round(float(line), 3)}
            summary.append(row)
            print(f"level {level}, " + (f"blocks of {block:3}" if block else "no map       ") + f": {row['extra_bpp']:+.4f} bpp, " +
                  ", ".join(f"{n} {row[n]:.2f} (without, at equal bits {row[n + '_without_at_equal_bpp']:.2f})" for n in run.numbers))
    lines = {f"blocks of {block}" if block else "no map": (*look, "-", {point["bpp"]: point for point in points})
             for look, (block, points) in zip(common.CYCLE, curves.items())}
    figure, panels = common.axes(len(run.numbers))
    for panel, number in zip(panels, run.numbers):
        common.curves(panel, run, number, lines, "bits per pixel, complete file", [0.05, 0.1, 0.2, 0.5])
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    hfd.run(main)
