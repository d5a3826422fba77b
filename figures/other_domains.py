"""The model on what it was not trained for: a medical slice, elevation maps, text, leaves, noise.

    python -m figures.other_domains --out figures

Rates are relative to WebP's at equal PSNR. Never use the sampler on data that somebody reads off.
"""
import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw, ImageFont

import sample
import train
from figures import codecs, common, metrics


def domains():
    """{name: PIL RGB image}, from what ships with matplotlib and what can be drawn."""
    def grey(a):
        """An array (h, w) as a picture, from its smallest value to its largest."""
        a = np.asarray(a, float)
        return Image.fromarray(np.uint8(np.round(255 * (a - a.min()) / np.ptp(a)))).convert("RGB")
    with get_sample_data("s1045.ima.gz") as f:              # 16 bits
        mri = np.frombuffer(f.read(), np.uint16).reshape(256, 256)
    text, rng = Image.new("RGB", (512, 512), "white"), np.random.default_rng(0)
    words = "it was the best of times the worst age wisdom foolishness epoch belief light".split()
    page = "\n".join(" ".join(rng.choice(words, 14)) for _ in range(32))
    ImageDraw.Draw(text).text((8, 0), page, "black", ImageFont.load_default(13))
    return {"portrait": common.portrait(), "MRI slice": grey(mri),
            "elevation": grey(get_sample_data("jacksboro_fault_dem.npz")["elevation"]),
            "sea floor": grey(get_sample_data("topobathy.npz")["topo"]), "text": text,
            "dead leaves": Image.fromarray(train.dead_leaves(384, rng)),
            "noise": Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8))}


def curves(run, image):
    """{codec: [(bytes, PSNR)]} of one picture."""
    found = {"autoencoder": [], "WebP": []}
    for level in range(1, run.last_level + 1):
        data, _ = sample.compress(image, run.model, level)
        decoded, _ = sample.decompress(data, run.model, rho=0)
        found["autoencoder"].append((len(data), metrics.psnr(image, decoded)))
    for quality in range(0, 100, 5):
        data = codecs.encode("WebP", image, quality)
        found["WebP"].append((len(data), metrics.psnr(image, codecs.decode(data))))
    return found


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("other_domains", __doc__, argv, scored=False, level=2)
    summary, columns = {}, {}
    for name, image in domains().items():
        image = common.around_centre(image, 128 if run.args.quick else 1024)
        found = run.point(name, lambda: curves(run, image))
        summary[name] = metrics.bd_rate(*zip(*found["WebP"]), *zip(*found["autoencoder"]))
        print(f"{name}: {summary[name]} % of bits, relative to WebP, at equal PSNR")
        data, _ = sample.compress(image, run.model, run.args.level)
        jpeg, _ = codecs.largest_within(len(data), "JPEG", image)
        shown = image, codecs.decode(jpeg), *(
            sample.decompress(data, run.model, rho=rho)[0] for rho in (0, 1))
        columns[name] = [common.around_centre(x, 128).resize((256, 256), 0) for x in shown]
    run.finish(common.sheet(columns, ("original", "JPEG", "autoencoder", "HFD")),
               bits_against_webp_percent=summary)


if __name__ == "__main__":
    sample.run(main)
