"""The portrait at a low rate: original, JPEG, AVIF, autoencoder, and two samples of HFD, at equal bytes, with an enlarged detail.

    python -m figures.comparison --out figures

The two samples come from one file, with two seeds. Where they differ, the model invents; where they agree, it may still.
"""
from PIL import Image

import hfd
import sample
from figures import codecs, common


def main(argv=None):
    """Code the portrait with each codec in as many bytes, and set the results side by side."""
    run = common.Run("comparison", __doc__, argv, level=2)
    image, args = run.images[0], run.args
    data, _ = sample.compress(image, run.model, args.level, args.seed)
    shown = [("original", image)]
    numbers = {}
    for name, options in (("JPEG", {"optimize": True}), ("AVIF", {"speed": 6})):
        file, setting = sample.largest_within(len(data), image, name, **options)
        shown.append((f"{name} q{setting}, {len(file)} bytes", codecs.decode(file)))
    for name, settings in (("autoencoder", {"rho": 0}), ("HFD, seed 0", {"seed": 0}), ("HFD, seed 1", {"seed": 1})):
        shown.append((f"{name}, {len(data)} bytes", sample.decompress(data, run.model, **settings)[0]))
    for name, decoded in shown[1:]:
        numbers[name] = {"psnr": round(sample.psnr(image, decoded), 2)}
        print(f"{name:28} PSNR {numbers[name]['psnr']:.2f} dB")
    rows = [sample.contact_sheet(shown[n:n + 3], common.detail(image, sample.DETAIL), 4) for n in (0, 3)]
    sheet = Image.new("RGB", (rows[0].width, 2 * rows[0].height), "white")
    for n, row in enumerate(rows):
        sheet.paste(row, (0, n * row.height))
    run.finish(sheet, pictures=numbers)


if __name__ == "__main__":
    hfd.run(main)
