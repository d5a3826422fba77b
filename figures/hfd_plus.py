"""Is the HFD+ map worth its bits? Files with and without it, by block size, at every level: bits, Frechet distance, PSNR.

    python -m figures.hfd_plus --images KODAK --out figures

A map costs bits, and so does the next better level. It is worth them if a point with a map lies below the line through the points without.
"""
import numpy as np

import hfd
import sample
from figures import common, metrics

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
    # Without a map one level further, so that there are files of more bits to compare with at the last level too.
    levels = sorted(run.args.levels)
    further = min(levels[-1] + 1, len(run.model.autoencoder.config.lambdas))
    measured = lambda level, block: run.measure(f"level {level}, block {block}", coded(run, level, block))["HFD"]
    curves = {block: [measured(level, block) for level in sorted({*levels, further} if not block else levels)]
              for block in (BLOCKS[::3] if run.args.quick else BLOCKS)}
    plain, summary = curves[0], []
    for block, points in curves.items():
        for level, base, point in zip(levels, plain, points):
            row = {"level": level, "block": block, "extra_bpp": round(point["bpp"] - base["bpp"], 5)}
            for n in run.numbers:   # at equal bits: against the line through the files without a map
                line = np.interp(np.log(point["bpp"]), np.log([p["bpp"] for p in plain]), [p[n] for p in plain])
                row |= {n: round(point[n], 3), n + "_without_at_equal_bpp": round(float(line), 3)}
            if run.features:
                row["fd_ratio_to_without"] = metrics.fd_ratio(point, base)
            summary.append(row)
            print(f"level {level}, " + (f"blocks of {block:3}" if block else "no map       ") + f": {row['extra_bpp']:+.4f} bpp, " +
                  ", ".join(f"{n} {row[n]:.2f} (without, at equal bits {row[n + '_without_at_equal_bpp']:.2f})" for n in run.numbers))
    # What the map changes at equal bits: the distance in per cent, PSNR in dB.
    figure, panels = common.axes(len(run.numbers))
    for panel, number in zip(panels, run.numbers):
        ends, sizes = [(max(curves), 0, "no map", common.GREY)], sorted(curves)[1:]
        panel.axhline(0, color=common.GREY)
        for (colour, marker), level in zip(common.CYCLE, levels):
            rows = {row["block"]: (row[number], row[number + "_without_at_equal_bpp"]) for row in summary if row["level"] == level}
            y = [100 * (own / other - 1) if number == "fd" else own - other for own, other in (rows[size] for size in sizes)]
            panel.plot(sizes, y, color=colour, marker=marker)
            ends.append((sizes[-1], y[-1], f"level {level}", colour))
        panel.set(title=common.TITLES[number], xlabel=f"side of the map's blocks (pixels), and its bits per pixel at level {levels[0]}", xscale="log",
                  ylabel=f"{run.feature_name} at equal bits (%)" if number == "fd" else "PSNR at equal bits (dB)")
        extra = {row["block"]: row["extra_bpp"] for row in summary if row["level"] == levels[0]}
        panel.set_xticks(sizes, [f"{size}\n{extra[size]:+.4f}" for size in sizes])
        panel.minorticks_off()
        common.label_ends(panel, ends)
    run.finish(figure, summary=summary)


if __name__ == "__main__":
    hfd.run(main)
