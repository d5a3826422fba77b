"""Rate against distortion, and rate against realism: the autoencoder, HFD on top of it, and codecs that everybody has.

    python -m figures.rate_distortion --images KODAK --out figures

The paper's claim in one figure: at the same bits, for it is the same file, the diffusion model lowers PSNR a little (left) and makes
pictures much more like photographs (right). Rates are those of complete files, headers included.
"""
import numpy as np

import hfd
import sample
from figures import codecs, common, metrics


def idempotence(model, k, decoded, level):
    """The share of the latent's non-zero symbols that come back when the decoded PIL picture is encoded again, and of all symbols.

    An ideal conditional sampler would return every one: the file says something about the picture, and a true sample
    agrees with what the file says (Xu et al. 2024)."""
    same = model.autoencoder.encode(sample.to_tensor(decoded, k.device), level - 1) == k                # (1, M, h, w)
    return {"symbols_back": same.float().mean().item(), "nonzero_symbols_back": same[k != 0].float().mean().nan_to_num(1).item()}


def ours(run, level, refine=0):
    """Code with the model at quality `level`, 1 .. Q, and decode with the defaults of sample.decompress. One file, decoded
    once, serves both curves, since HFD starts from the autoencoder's picture. refine: as for sample.compress."""
    model, refined = run.model, ", refined" if refine else ""

    def code(i, image):
        """Picture i's file, and both pictures that come from it."""
        seed = run.args.seed + i            # as if each file had been given a seed of its own
        data, report = sample.compress(image, model, level, seed, refine=refine)
        header = sample.parse(data, run.names[i])
        (k, energy), unpacking = common.timed(sample.decode_latent, header, model, run.names[i])    # (1, M, h, w)
        x_hat, decoding = common.timed(model.autoencoder.decode, k, level - 1)                      # (1, 3, H', W')
        seconds = report["seconds"] | {"range decoder": unpacking, "decoder": decoding}
        decoded = sample.to_image(x_hat, *image.size)
        variants = {"autoencoder" + refined: (decoded, seconds, idempotence(model, k, decoded, level))}
        if model.diffusion is not None:
            x, sampling = common.timed(lambda: hfd.sample_picture(model.diffusion, x_hat, level - 1, seed=seed, energy=energy))
            decoded = sample.to_image(x, *image.size)
            variants["HFD" + refined] = decoded, seconds | {"diffusion": sampling}, idempotence(model, k, decoded, level)
        return data, variants
    return code


def theirs(name, encode, setting):
    """Code with one of the codecs in codecs.py."""
    def code(i, image):
        """Picture i's file in this codec, and what it decodes to."""
        data, encoding = common.timed(encode, image, setting)
        decoded, decoding = common.timed(codecs.decode, data)
        return data, {name: (decoded, {"encoder": encoding, "decoder": decoding})}
    return code


def measure(run):
    """All curves: {name: [(setting, numbers)]}, from low rates to high ones."""
    curves = {}
    for name, (encode, settings) in codecs.CODECS.items():
        for setting in settings[::3 if run.args.quick else 1]:
            curves.setdefault(name, []).append((setting, run.measure(f"{name} {setting}", theirs(name, encode, setting))[name]))
    for level in range(1, len(run.model.autoencoder.config.lambdas) + 1, 2 if run.args.quick else 1):
        variants = run.measure(f"level {level}", ours(run, level))
        if run.args.refine:
            variants = variants | run.measure(f"refined {run.args.refine}, level {level}", ours(run, level, run.args.refine))
        for name, numbers in variants.items():
            curves.setdefault(name, []).append((level, numbers))
    return curves


OURS = "autoencoder", "HFD", "autoencoder, refined", "HFD, refined"


def summarise(curves, kodak):
    """What the curves say in single numbers: BD rates, and what sampling costs at each level."""
    # (bits, quality) of each curve; less distance is more quality, and equal ratios of it count the same, as equal steps of PSNR do.
    by_psnr, by_fd = {}, {}
    for name, points in curves.items():
        bpp, psnr = ([numbers[key] for _, numbers in points] for key in ("bpp", "psnr"))
        by_psnr[name] = bpp, psnr
        if "fd" in points[0][1]:
            by_fd[name] = bpp, [-np.log(numbers["fd"]) for _, numbers in points]
    if kodak:
        by_psnr |= {name: tuple(zip(*points)) for name, (_, points) in codecs.PUBLISHED.items()}

    def difference(curve, other):
        """The BD rate of a curve against another one, in per cent of its bits; None where they have no quality in common."""
        try:
            return round(metrics.bd_rate(*other, *curve), 1)
        except ValueError:
            return None

    of_ours = lambda curves: {ours: {name: difference(curves[ours], other) for name, other in curves.items() if name != ours}
                              for ours in OURS if ours in curves}
    summary = {"bits_at_equal_psnr_percent": of_ours(by_psnr), "bits_at_equal_fd_percent": of_ours(by_fd)}
    if "HFD" in curves:
        pairs = list(zip(curves["autoencoder"], curves["HFD"]))
        summary["psnr_drop_db"] = {level: round(a["psnr"] - b["psnr"], 3) for (level, a), (_, b) in pairs}
        if "fd" in pairs[0][0][1]:
            summary["fd_ratio"] = {level: metrics.fd_ratio(b, a) for (level, a), (_, b) in pairs}
        # Sampling must not tint pictures: by how much it changes a picture's mean colour, in steps of 1/255.
        summary["colour_shift_255"] = {level: round(float(np.abs(np.subtract(a["rgb_each"], b["rgb_each"])).mean()), 4)
                                       for (level, a), (_, b) in pairs}
    return summary


def report(curves, summary):
    """Print all of it as a table."""
    print(f"\n{'codec':20} {'setting':>7} {'bpp':>7} {'PSNR':>6} {'Frechet distance [95 %]':>26} {'s to encode':>11} {'to decode':>9}")
    for name, points in curves.items():
        for setting, n in points:
            fd = "{:.2f} [{:.2f}, {:.2f}]".format(n["fd"], *n["fd_interval"]) if "fd" in n else "-"
            encoding = sum(seconds for part, seconds in n["seconds"].items() if part.endswith("encoder"))
            decoding = sum(n["seconds"].values()) - encoding
            print(f"{name:20} {setting:7} {n['bpp']:7.4f} {n['psnr']:6.2f} {fd:>26} {encoding:11.3f} {decoding:9.3f}")
    for what in ("psnr", "fd"):
        for ours, found in summary[f"bits_at_equal_{what}_percent"].items():
            print(f"bits of {ours} at equal {'PSNR' if what == 'psnr' else 'Frechet distance'}: " + ", ".join(
                f"{name} " + ("-" if bd is None else f"{bd:+.1f} %") for name, bd in found.items()))
    if "HFD" not in curves:
        return print("note: this checkpoint has no diffusion model yet, so there is no curve of HFD")
    for level, ratio in summary.get("fd_ratio", {}).items():
        print(f"HFD against the autoencoder, level {level}: Frechet distance {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] times as large")
    for level, drop in summary["psnr_drop_db"].items():
        print(f"HFD against the autoencoder, level {level}: PSNR lower by {drop:.2f} dB, mean colour shifted by "
              f"{summary['colour_shift_255'][level]:.2f} / 255")
    for (level, a), (_, b) in zip(curves["autoencoder"], curves["HFD"]):
        print(f"idempotence, level {level}: of the symbols that are not zero, {100 * a['nonzero_symbols_back']:.1f} % come back from the autoencoder's "
              f"picture, {100 * b['nonzero_symbols_back']:.1f} % from HFD's")


# Published curves that are best named where they start (and by how many points the name is away); the others where they end.
STARTS = {"ELIC": (-4, 0), "VTM": (-4, 0), "BPG 4:4:4": (-4, 4), "MS-ILLM": (-20, -6)}


def draw(curves, kodak, feature_name):
    """A matplotlib figure: PSNR against bpp, and beside it the Frechet distance if it was measured."""
    figure, panels = common.axes(2 if feature_name else 1)
    for panel, number in zip(panels, ("psnr", "fd")):
        ends, all_bpp = [], []
        for name, points in curves.items():
            if name not in common.LOOK:     # refined: nearly on top of the others; the numbers are in the table
                continue
            colour, marker = common.LOOK[name]
            bpp, y = ([numbers[key] for _, numbers in points] for key in ("bpp", number))
            panel.plot(bpp, y, color=colour, marker=marker, zorder=3)
            if number == "fd":
                low, high = zip(*(numbers["fd_interval"] for _, numbers in points))
                panel.fill_between(bpp, low, high, color=colour, alpha=0.12, linewidth=0)
            ends.append((bpp[-1], y[-1], name, colour))
            all_bpp += bpp
        published = codecs.PUBLISHED if number == "psnr" and kodak else {}
        for name, (_, points) in published.items():
            bpp, y = zip(*points)
            panel.plot(bpp, y, color=common.GREY, linewidth=0.8, linestyle=(0, (4, 2)))
            if name in STARTS:
                panel.annotate(name, (bpp[0], y[0]), STARTS[name], textcoords="offset points", color=common.GREY, fontsize=8, ha="right",
                               va="center", arrowprops={"arrowstyle": "-", "color": common.GREY, "linewidth": 0.4})
            else:
                ends.append((bpp[-1], y[-1], name, common.GREY))
        panel.set_xscale("log")
        panel.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
        panel.minorticks_off()
        panel.set_xlim(0.02 if published else min(all_bpp) / 1.15, max(all_bpp) * 1.1)
        panel.set_xlabel("bits per pixel, complete file")
        if number == "psnr":
            panel.set(title=common.TITLES[number], ylabel="PSNR (dB)")
        else:
            panel.set(title=common.TITLES[number], ylabel=f"{feature_name} (Fréchet distance)", yscale="log")
            common.plain_log_ticks(panel)
        common.label_ends(panel, ends)
    return figure


def main(argv=None):
    """Measure, print, draw."""
    run = common.Run("rate_distortion", __doc__, argv, lambda parser: parser.add_argument(
        "--refine", type=int, default=0, metavar="N", help="also measure files whose latent was refined in N steps (compress --refine)"),
        needs_diffusion=False)
    curves = measure(run)
    summary = summarise(curves, run.kodak)
    report(curves, summary)
    published = {name: {"source": source, "bpp_psnr": points} for name, (source, points) in codecs.PUBLISHED.items()}
    run.finish(draw(curves, run.kodak, run.feature_name), summary=summary, published_for_kodak=published if run.kodak else None)


if __name__ == "__main__":
    hfd.run(main)
