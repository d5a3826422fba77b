"""The evaluation: metrics against closed forms, and scripts from flags to files."""
import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import refusal

import hfd
import sample
import train
from figures import codecs, common, metrics, patches, spectrum, true_rate


def picture(x):
    """An array (h, w, 3) or what broadcasts to it, of 0 .. 255, as a PIL image."""
    x = np.broadcast_to(x, (*np.shape(x)[:2], 3))
    return Image.fromarray(x.round().clip(0, 255).astype(np.uint8))


def texture(image):
    """A cheap feature set: mean differences of neighbours, on 32-pixel patches."""
    x = metrics.patches(image, 32, 16).double()
    found = torch.cat([x.diff(dim=d).abs().mean(dim=(2, 3)) for d in (2, 3)], dim=1).numpy()
    return {"fd": found, "fd16": found[:, :3]}


def script(name, *argv):
    """Run figures/NAME.py with these flags."""
    importlib.import_module(f"figures.{name}").main(list(argv))


def test_bd_rate_of_scaled_curve():
    """A codec that needs 0.9 of the bits has a BD rate of -10 %, wherever both were measured."""
    psnr, other = np.array([26.0, 28.1, 30.9, 34.0]), np.array([35.5, 32.4, 29.6, 27.5])
    rates = np.exp(0.2 * psnr)
    assert metrics.bd_rate(rates, psnr, 0.9 * np.exp(0.2 * other), other) == pytest.approx(-10)
    assert metrics.bd_rate([0.1, 0.2], [20, 25], [0.1, 0.2], [30, 35]) is None


@pytest.mark.parametrize("n_a, n_b, d", [(40, 60, 5), (12, 9, 50)])
def test_frechet_against_the_textbook(n_a, n_b, d):
    """The nuclear norm gives the textbook's formula, with more samples than features and with
    fewer. (Its root in the symmetric form exists even where C_a C_b is singular.)"""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n_a, d)) @ rng.standard_normal((d, d))
    b = 1 + 2 * rng.standard_normal((n_b, d))
    values, vectors = np.linalg.eigh(np.cov(a.T))
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ np.cov(b.T) @ half).clip(0)).sum()
    means = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    expected = means + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6)


def test_realism_falls_with_noise(photo):
    """The more noise, the greater the distance from the originals, and ratios are known better than
    distances. The interval of a mean is 2 x 1.96 standard errors wide."""
    shown, noise = (photo, photo.rotate(90), photo.rotate(180)), np.random.default_rng(0)
    noised = [[texture(picture(x + sigma * noise.standard_normal((75, 100, 3)))) for x in shown]
              for sigma in (0, 2, 6, 18)]
    scores = [metrics.realism([texture(x) for x in shown], features) for features in noised]
    assert scores[0]["fd"] == pytest.approx(0, abs=1e-9)
    assert all(np.diff([score["fd"] for score in scores]) > 0)
    low, high = scores[3]["fd_interval"]
    ratio, ratio_low, ratio_high = metrics.ratio(scores[3], scores[2])
    assert ratio == pytest.approx(scores[3]["fd"] / scores[2]["fd"], abs=1e-3)
    assert low <= scores[3]["fd"] <= high and ratio_high / ratio_low < high / low
    x = np.random.default_rng(0).standard_normal(100)
    low, high = metrics.interval(metrics.bootstrap(lambda n: x[n].mean(), 100, replicates=1000))
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 10, rel=0.1)


def test_known_pictures_and_numbers():
    """A cosine has its power at its own frequency, white noise has the same everywhere. Noise of
    one colour axis on flat ground is seen with its standard deviation, grey noise is not. Stairs
    jump at borders only. 1000 bits that save half a bit a pixel pay on the 20th picture of 100. A
    difference of 5 is 20 log10(51) dB. The JPEG to compare with is the best that is not larger."""
    rng, wave = np.random.default_rng(0), 128 + 100 * np.cos(np.pi / 2 * np.arange(256))
    power = spectrum.radial_power(picture(np.tile(wave[:, None], (256, 1, 1))))
    assert abs(power.argmax() - spectrum.BINS / 2) <= 1
    power = spectrum.radial_power(picture(rng.normal(128, 20, (128, 128, 1))))
    assert power[32:].mean() == pytest.approx(power[8:32].mean(), rel=0.1)
    clean, noise = np.full((64, 320, 3), 128.0), rng.normal(0, 6, (64, 320, 1))
    clean[:, 16:] += rng.normal(0, 30, (64, 304, 1))        # all but one column of squares is busy
    for axis, rms in (([1, 0, -1], 6), ([1, 1, 1], 0)):
        found = spectrum.grain(picture(clean + noise * axis), picture(clean))
        assert found == pytest.approx(rms, rel=0.15, abs=0.1)
    stairs = torch.arange(256.0).div(patches.PATCH).floor().expand(1, 3, 256, 256)
    assert patches.jump(stairs + stairs.mT) == pytest.approx(255)
    ours = [{"psnr": 30, "bpp": 0.5}, {"psnr": 32, "bpp": 3}, {"psnr": 50, "bpp": 4}]
    theirs = [{"psnr": 30, "bpp": 1}, {"psnr": 34, "bpp": 2}]
    found = [true_rate.break_even(point, theirs, "psnr", 1000, 100) for point in ours]
    assert found == [20, "never", None]
    grey, other, busy = (picture(x + np.zeros((64, 64, 3))) for x in (
        100, 105, rng.normal(128, 40, (64, 64, 3))))
    assert metrics.psnr(grey, other) == pytest.approx(34.151, abs=1e-3)
    file, quality = codecs.largest_within(2000, "JPEG", busy)
    assert len(file) <= 2000 < len(codecs.encode("JPEG", busy, quality + 1))


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A folder: two pictures in `in`; models with the tiny one's autoencoder or transforms."""
    root = tmp_path_factory.mktemp("figures")
    model, leaves = hfd.load_model(tiny_model), train.dead_leaves(128, np.random.default_rng(1))
    for name in ("in", "factorized"):
        (root / name).mkdir()
        Image.fromarray(leaves).rotate(9 * len(name)).save(root / "in" / f"{name}.png")
    other = hfd.Autoencoder(replace(model.autoencoder.config, prior="factorized"))
    other.load_state_dict(model.autoencoder.state_dict(), strict=False)
    hfd.save_part(root / "factorized" / "autoencoder.npz", other, {})
    for name, seen in (("early", 0.5), ("late", 2.0)):
        shutil.copytree(tiny_model, root / name)
        model.diffusion.net.head[1].bias.add_(0.01)
        hfd.save_part(root / name / "denoiser.npz", model.diffusion, {"gigapixels": seen},
                      autoencoder=model.identity.hex())
    return root


@pytest.fixture(scope="module")
def results(tiny_model, folders):
    """The JSON of every script, by name: run with --quick, small pictures, cheap features."""
    found, portrait = {}, common.portrait().crop((100, 100, 292, 292))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders)
        patch.setattr(metrics, "efficientnet", lambda device: ({"fd": "", "fd16": ""}, texture))
        patch.setattr(common, "portrait", lambda: portrait)
        patch.setattr(train, "POOL", 4)
        patch.setitem(common.STYLE, "figure.dpi", 50)
        patch.setattr(metrics, "bootstrap", partial(metrics.bootstrap, replicates=9))
        patch.setattr(train, "dead_leaves", lambda size, rng: np.asarray(portrait))
        for line in ("rate_distortion --images in --factorized factorized", "schedule", "path",
                     "eta --images in --levels 1 --others early", "trajectory", "comparison",
                     "steps --images in --levels 1 --most 8 --flow late", "other_domains",
                     "learning --images in --levels 1 --others early --model late",
                     "realism --images in --levels 1", "spectrum --images in --levels 1 3",
                     "hfd_plus --images in --levels 1 2", "patches --megapixels 0.1",
                     "true_rate --results rate_distortion.json", "speed --batch 1"):
            name, *words = line.split()
            script(name, "--quick", "--model", tiny_model, "--out", ".", *words)
            found[name] = json.loads(Path(f"{name}.json").read_text())
            assert name == "speed" or Image.open(f"{name}.png").width > 200
        with contextlib.redirect_stdout(io.StringIO()) as answers:      # which leaves no files
            script("exercises", "--quick", "--model", tiny_model)
        found["exercises"] = answers.getvalue()
    return found


def test_scripts_from_flags_to_files(results):
    """HFD and the autoencoder share a file; HFD+ adds a map; the factorized prior has the same
    picture in other bits; rho = 0 costs nothing, and means of samples go back there. No screen is
    needed."""
    found = results["rate_distortion"]
    both = found["points"]["level 1"]["variants"]
    assert both["HFD"]["bpp"] == both["autoencoder"]["bpp"]
    assert found["points"]["level 1, HFD+"]["variants"]["HFD+"]["bpp"] > both["HFD"]["bpp"]
    over = found["summary"]["level 1, autoencoder over factorized prior"]
    assert over["db"] == 0 and over["fd"][0] == 1 != over["bits"]
    row, other = results["eta"]["summary"]
    fd = {eta: results["eta"]["points"][f"level 1, this model, eta {eta}"]["variants"]["HFD"]["fd"]
          for eta in (0.025, 0.5)}
    assert row["best_eta"] == min(fd, key=fd.get) and other["net"] == "early"
    first = [results["steps"]["points"][f"level 1, {name}, 1 steps"]["variants"]["HFD"]["psnr"]
             for name in hfd.SAMPLERS]
    assert len(set(first)) == 1                             # all return the denoiser's first answer
    ratio = results["realism"]["squared_error_over_autoencoder"]["1"]
    blurry = results["realism"]["points"]["level 1"]["variants"]["rho 0"]
    assert blurry["psnr"] == both["autoencoder"]["psnr"]
    assert ratio["mean of 1"] == ratio["rho 1"] > ratio["mean of 2"]
    assert matplotlib.get_backend() == os.environ["MPLBACKEND"] == "agg"
    assert all(row["extra_bpp"] > 0 for row in results["hfd_plus"]["summary"])
    points = results["patches"]["points"]
    assert points["together, context 0"]["worst"] > 10 * points["together, context 64"]["worst"]
    answered = {line.split(".")[0] for line in results["exercises"].splitlines()}
    assert {*map(str, range(1, 9)), "13"} <= answered
    for stage in results["speed"]["stages"].values():
        assert 0 < stage["share_of_matrix_product"] < 1 and stage["step_over_convolutions"] > 0


def test_stopped_run_continues(folders, tiny_model, monkeypatch):
    """A run that was stopped measures only what is missing, unless something that its numbers
    depend on has changed. A damaged file is named. A script without a docstring runs, too."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.chdir(folders)
    calls = []

    def code(i, image):
        calls.append(i)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return b"12345", {"same": (image, {})}

    def run(*more):
        argv = ["--images", "in", "--model", tiny_model, "--out", ".", *more]
        run = common.Run("again", None, argv)
        score = run.measure("first", code)["same"], run.measure("second", code), run.finish()
        assert score[0]["bpp"] == pytest.approx(40 / 128 ** 2, abs=1e-5)
    with pytest.raises(KeyboardInterrupt):
        run()
    for more, count in ((), 5), ((), 5), (("--seed", "1"), 9), (("--fresh",), 13):
        run(*more)                                          # two pictures, two points
        assert len(calls) == count
    Path("again.json").write_text('{"about": ')
    assert "again.json: damaged" in refusal(run)


@pytest.mark.parametrize("line, told", [
    ("spectrum --levels 1 --images small.png", "128 a side"), ("learning --levels 1", "gigapixels"),
    ("steps --levels 9", "levels 1 to 3"), ("steps --levels 1 --flow factorized", "denoiser"),
    ("comparison --model factorized", "no denoiser"), ("true_rate --results small.png", "damaged")])
def test_one_line_for_what_cannot_be_measured(line, told, folders, tiny_model, monkeypatch):
    """Levels that cannot be, small pictures, foreign models, no denoiser: refused in one line."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.chdir(folders)
    Image.new("RGB", (16, 200)).save("small.png")
    name, *words = line.split()
    assert told in refusal(script, name, "--model", tiny_model, "--out", "out", "--quick", *words)
