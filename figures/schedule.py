"""The noise schedule: log SNR, alpha and sigma for several eta, and what "less noise" looks like.

    python -m figures.schedule --out figures
"""
import numpy as np
import torch

import hfd
import sample
from figures import common

ETAS = {1.0: "#000000", 0.5: "#0072B2", 0.25: "#009E73", 0.1: "#D55E00"}
DETAIL = (175, 15, 335, 175)


def at(t, eta):
    """{name: values} at times t."""
    log_snr = hfd.log_snr_at(torch.as_tensor(t, dtype=torch.float64), eta)
    alpha, sigma = hfd.alpha_sigma(log_snr)
    return {"log SNR": log_snr.numpy(), "alpha": alpha.numpy(), "sigma": sigma.numpy()}


def main(argv=None):
    """Run the script. argv: a list of words, or None for the shell's."""
    run = common.Run("schedule", __doc__, argv, scored=False, stage1=True)
    figure, panels = common.axes(3, rows=2, width=3.6, height=2.2)
    t, times = np.linspace(0.002, 0.998, 499), (0.25, 0.5, 0.75)
    x = sample.to_tensor(run.images[0].crop(DETAIL), "cpu").double()    # (1, 3, 160, 160)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(run.args.seed))
    for n, (name, time) in enumerate(zip(("log SNR", "alpha", "sigma"), times)):
        lines = [(f"eta = {eta}", t, at(t, eta)[name], (ETAS[eta], "")) for eta in ETAS]
        common.plot(panels[n], lines, title=name, xlabel="time t")
        shown = []
        for eta in (1.0, 0.5, 0.25):
            z = at(time, eta)["alpha"].item() * x + at(time, eta)["sigma"].item() * eps
            shown.append(np.asarray(sample.to_image(z, *x.shape[2:])))
        panels[n + 3].imshow(np.hstack(shown))
        panels[n + 3].set_title(f"z_t at t = {time}, with eta = 1, 0.5, 0.25")
        panels[n + 3].axis("off")
    numbers = {eta: {name: round(y.item(), 4) for name, y in at(0.5, eta).items()} for eta in ETAS}
    print(f"at t = 1/2, by eta: {numbers}")
    run.finish(figure, at_t_one_half_by_eta=numbers)


if __name__ == "__main__":
    sample.run(main)
