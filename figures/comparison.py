"""The portrait at equal bytes: JPEG, AVIF, the autoencoder, and two samples of HFD from one file.

    python -m figures.comparison --out figures

Where the two samples differ, the model invents; where they agree, it may still.
"""
import sample
from figures import codecs, common, metrics

FACE = (140, 56, 396, 376)                  # of the portrait


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("comparison", __doc__, argv, scored=False, level=2)
    image, (data, _) = run.images[0], run.coded(run.args.level, 0)
    shown = [("original", image)]
    for name in ("JPEG", "AVIF"):
        file, quality = codecs.largest_within(len(data), name, image)
        shown.append((f"{name} q{quality}, {len(file)} bytes", codecs.decode(file)))
    for name, settings in (("autoencoder", {"rho": 0}), ("HFD, seed 0", {"seed": 0}),
                           ("HFD, seed 1", {"seed": 1})):
        decoded, _ = sample.decompress(data, run.model, **settings)
        shown.append((f"{name}, {len(data)} bytes", decoded))
    numbers = {name: round(metrics.psnr(image, decoded), 2) for name, decoded in shown[1:]}
    for name, decibels in numbers.items():
        print(f"{name:28} PSNR {decibels:.2f} dB")
    run.finish(common.contact_sheet(shown, FACE), psnr=numbers)


if __name__ == "__main__":
    sample.run(main)
