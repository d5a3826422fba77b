"""The noise schedule: log SNR, alpha and sigma for several eta, and what "less noise" looks like.

    python -m figures.schedule --out figures

HFD shifts the cosine schedule by eta: at every t there is less noise in z_t than text-to-image models use, because x_hat already tells
what is where. The pictures show a detail of the portrait at the same three times under three schedules.
"""
import numpy as np
import torch

import hfd
import sample
from figures import common

ETAS = {1.0: ("#000000", "-"), 0.5: ("#0072B2", "--"), 0.25: ("#009E73", "-."), 0.1: ("#D55E00", ":")}
SHOWN, TIMES = (1.0, 0.5, 0.25), (0.25, 0.5, 0.75)
DETAIL = (175, 15, 335, 175)


def draw(image, detail, seed):
    """(matplotlib figure, numbers): three panels of curves above, z_t of a detail (left, top, right, bottom) of a PIL picture below."""
    common.plt.rcParams.update(common.STYLE)
    figure = common.plt.figure(figsize=(10.2, 4.15))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.75, 1))
    panels = top.subplots(1, 3)
    t, numbers = torch.linspace(0.002, 0.998, 499, dtype=torch.float64), {}
    for eta, (colour, line) in ETAS.items():
        log_snr = hfd.log_snr_at(t, eta)
        for panel, values in zip(panels, (log_snr, *hfd.alpha_sigma(log_snr))):
            panel.plot(t, values, color=colour, linestyle=line)
        middle = hfd.log_snr_at(torch.tensor(0.5).double(), eta)
        alpha, sigma = hfd.alpha_sigma(middle)
        numbers[eta] = {"log_snr": float(middle), "alpha": float(alpha), "sigma": float(sigma)}
    for panel, name, where in zip(panels, ("log SNR (nats)", "alpha, the signal's scale", "sigma, the noise's scale"),
                                  ((0.8, 0.6, 0.4, 0.2), (0.81, 0.82, 0.85, 0.88), (0.5,) * 4)):
        panel.set(title=name, xlabel="time t")
        for at, line, (eta, (colour, _)) in zip(where, panel.lines, ETAS.items()):                  # named where there is room
            panel.text(at, line.get_ydata()[round(at * 498)], f"eta = {eta}", color=colour, fontsize=8, ha="center", va="center",
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    x = sample.to_tensor(image.crop(detail), "cpu")                                                 # (1, 3, 160, 160)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    cells = bottom.subplots(1, len(SHOWN) * len(TIMES))
    for n, cell in enumerate(cells):
        time, eta = TIMES[n // len(SHOWN)], SHOWN[n % len(SHOWN)]
        alpha, sigma = hfd.alpha_sigma(hfd.log_snr_at(torch.tensor(time).double(), eta))
        cell.imshow(np.asarray(sample.to_image((alpha * x + sigma * eps).float().clamp(-1, 1), *image.crop(detail).size)))
        cell.set_title(f"t = {time}\neta = {eta}", color=ETAS[eta][0], fontsize=8)
        cell.axis("off")
    return figure, numbers


def main(argv=None):
    """Draw the figure, print its numbers."""
    run = common.Run("schedule", __doc__, argv, needs_diffusion=False)
    image = run.images[0]
    figure, numbers = draw(image, common.detail(image, DETAIL), run.args.seed)
    for eta, values in numbers.items():
        print(f"eta {eta:g}, t = 1/2: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    run.finish(figure, at_t_one_half_by_eta=numbers)


if __name__ == "__main__":
    hfd.run(main)
