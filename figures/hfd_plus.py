"""Is the HFD+ map worth its bits? Files with and without it, compared at equal bits.

    python -m figures.hfd_plus --images KODAK --out figures
"""
import numpy as np

import sample
from figures import common


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("hfd_plus", __doc__, argv, levels=[1, 2, 3])
    blocks, rows = (64,) if run.args.quick else (16, 32, 64, 128), []

    def measured(level, block):
        """The score of files with a map in blocks of that side; 0 for none."""
        def code(i, image):
            """Picture i's file with a map, and its sample."""
            data, _ = sample.compress(image, run.model, level, run.args.seed + i, block)
            decoded, report = sample.decompress(data, run.model, run.names[i])
            return data, {"HFD": (decoded, report["seconds"])}
        return run.measure(f"level {level}, block {block}", code)["HFD"]
    # Without a map one level further, so that the last one has something to be compared with, too.
    further = min(max(run.args.levels) + 1, run.last_level)
    plain = {level: measured(level, 0) for level in sorted({*run.args.levels, further})}
    bits = np.log([score["bpp"] for score in plain.values()])
    for level in run.args.levels:
        for block in blocks:
            score, row = measured(level, block), {"level": level, "block": block}
            row["extra_bpp"] = round(score["bpp"] - plain[level]["bpp"], 5)
            for n in run.numbers:
                line = np.interp(np.log(score["bpp"]), bits, [p[n] for p in plain.values()]).item()
                change = 100 * (score[n] / line - 1) if n == "fd" else score[n] - line
                row |= {n: round(score[n], 3), f"{n} at equal bpp without": round(line, 3),
                        f"{n} change": round(change, 3)}
            print(", ".join(f"{name} {value:g}" for name, value in row.items()))
            over = run.compare("    over the same file without", score, plain[level])
            rows.append(row | {"over_same": over})
    figure, panels = common.axes(len(run.numbers))
    ticks = {row["block"]: f"{row['block']}\n{row['extra_bpp']:+.4f}" for row in rows[:len(blocks)]}
    for panel, number in zip(panels, run.numbers):
        lines = [("no map", [blocks[0], blocks[-1]], [0, 0], (common.GREY, ""))]
        for look, level in zip(common.CYCLE, run.args.levels):
            y = [row[f"{number} change"] for row in rows if row["level"] == level]
            lines.append((f"level {level}", blocks, y, look))
        common.plot(panel, lines, ticks, title=common.AXES[number]["title"], xscale="log",
                    xlabel=f"side of blocks, and bits per pixel at level {run.args.levels[0]}",
                    ylabel="at equal bits " + ("(%)" if number == "fd" else "(dB)"))
    run.finish(figure, summary=rows)


if __name__ == "__main__":
    sample.run(main)
