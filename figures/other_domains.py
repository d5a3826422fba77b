"""The shipped model on what it was not trained for: a medical slice, elevation maps, text, dead leaves, noise.

    python -m figures.other_domains --out figures

Rate at equal PSNR and PSNR at equal rate, relative to WebP (Bjontegaard), and pictures at one level. A learned codec knows photographs:
where nothing is like them, what it has learned is wrong, and where the sampler does not know what it sees, it paints photographs'
texture. Never use it on data that somebody will read off.
"""
import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw, ImageFont

import hfd
import sample
import train
from figures import codecs, common, metrics


def domains():
    """{name: PIL RGB image}, from what ships with matplotlib and what can be drawn."""
    grey = lambda a: Image.fromarray(np.round(255 * (a - a.min()) / (a.max() - a.min())).astype(np.uint8)).convert("RGB")
    with get_sample_data("s1045.ima.gz") as f:                      # 256 x 256, 16 bits
        mri = grey(np.frombuffer(f.read(), np.uint16).reshape(256, 256).astype(float))
    terrain = [grey(np.asarray(get_sample_data(name)[key], float)) for name, key in (("jacksboro_fault_dem.npz", "elevation"), ("topobathy.npz", "topo"))]
    text, font, rng = Image.new("RGB", (512, 512), "white"), ImageFont.load_default(13), np.random.default_rng(0)
    words = "it was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness".split()
    for line in range(32):
        ImageDraw.Draw(text).text((8, 16 * line), " ".join(rng.choice(words, 14)), "black", font)
    return {"portrait": common.pictures()[0][1], "MRI slice": mri, "elevation": terrain[0], "sea floor": terrain[1], "text": text,
            "dead leaves": Image.fromarray(train.dead_leaves(384, rng)), "noise": Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8))}


def main(argv=None):
    """Rate-distortion curves of the autoencoder and WebP on each domain; a sheet of details."""
    run = common.Run("other_domains", __doc__, argv, level=2)
    levels = range(1, len(run.model.autoencoder.config.lambdas) + 1)
    rows, summary = [], {}
    for name, image in domains().items():
        def compute():
            """Both curves on this one picture."""
            pixels, curves = image.width * image.height, {"autoencoder": [], "HFD": [], "WebP": []}
            for level in levels:
                data, _ = sample.compress(image, run.model, level)
                for which, rho in (("autoencoder", 0), ("HFD", 1)):
                    curves[which].append((8 * len(data) / pixels, sample.psnr(image, sample.decompress(data, run.model, rho=rho)[0])))
            for quality in range(0, 100, 5):
                data = codecs.webp(image, quality)
                curves["WebP"].append((8 * len(data) / pixels, sample.psnr(image, codecs.decode(data))))
            return {"bpp_psnr": curves}
        curves = run.point(name, compute)["bpp_psnr"]
        webp, ours = ({b: p for b, p in curves[which]} for which in ("WebP", "autoencoder"))
        webp, ours = (sorted({p: b for b, p in curve.items()}.items()) for curve in (webp, ours))    # neither rate nor PSNR twice
        (psnr_a, rates_a), (psnr_b, rates_b) = zip(*webp), zip(*ours)
        numbers = summary[name] = {}
        for number, difference in (("bd_rate_percent", metrics.bd_rate), ("bd_psnr_db", metrics.bd_psnr)):
            try:
                numbers[number] = round(difference(rates_a, psnr_a, rates_b, psnr_b), 2)
            except ValueError:                                      # nothing in common
                numbers[number] = None
        numbers["psnr_change_by_sampling_db"] = [round(b[1] - a[1], 2) for a, b in zip(curves["autoencoder"], curves["HFD"])]
        say = lambda number, unit: "nothing in common" if number is None else f"{number:+.2f} {unit}"
        print(f"{name:12} against WebP {say(numbers['bd_rate_percent'], '% bits')} at equal PSNR, {say(numbers['bd_psnr_db'], 'dB')} at equal bits; "
              f"sampling changes PSNR by {numbers['psnr_change_by_sampling_db'][run.args.level - 1]:+.2f} dB")
        data, _ = sample.compress(image, run.model, run.args.level)
        detail = lambda picture: common.around_centre(picture, 128).resize((256, 256), Image.NEAREST)
        jpeg = codecs.decode(sample.largest_within(len(data), image, optimize=True)[0])
        rows.append((name, [detail(p) for p in (image, jpeg, sample.decompress(data, run.model, rho=0)[0], sample.decompress(data, run.model)[0])]))
    cell, font = 256 + 4, ImageFont.load_default(28)
    sheet = Image.new("RGB", (40 + cell * len(rows) - 4, 40 + 4 * cell), "white")
    names = Image.new("RGB", (4 * cell, 40), "white")               # of the rows, to be read upwards
    for row, name in enumerate(("original", "JPEG", "autoencoder", "HFD")):
        ImageDraw.Draw(names).text(((3 - row) * cell + cell / 2, 20), name, "black", font, "mm")
    sheet.paste(names.transpose(Image.ROTATE_90), (0, 40))
    for column, (name, details) in enumerate(rows):
        ImageDraw.Draw(sheet).text((40 + column * cell + 2, 2), name, "black", font)
        for row, picture in enumerate(details):
            sheet.paste(picture, (40 + column * cell, 40 + row * cell))
    run.finish(sheet, summary=summary)


if __name__ == "__main__":
    hfd.run(main)
