"""What someone meets who has just cloned the repo: the README, the demo, the model that ships."""
import argparse
import importlib
import json
import operator
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import find_device

import hfd
import sample
from figures import common, metrics

ROOT = Path(__file__).parent.parent
TEXTS = {path: path.read_text() for pattern in ("*.md", "figures/*.md", "checkpoints/*.md")
         for path in sorted(ROOT.glob(pattern))}
README = TEXTS[ROOT / "README.md"]


@pytest.fixture(scope="module")
def shipped():
    """The model that ships, loaded."""
    return hfd.load_model(sample.MODEL)


def numbers(text):
    """All numbers with a point in it."""
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_every_command_in_the_texts_exists(monkeypatch):
    """Each command, in a block or in a sentence, names a script that is there and flags it has."""
    parse_args, commands = argparse.ArgumentParser.parse_args, []

    def parse_and_stop(parser, argv=None):
        parse_args(parser, argv)                            # which exits with 2 if it fails
        sys.exit("understood")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for text in TEXTS.values():
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
        inline = [line for line in re.findall(r"`(python [^`]+)`", text) if "..." not in line]
        for line in blocks.splitlines() + inline:
            commands += [part.strip() for part in line.split("#")[0].split("&&")]
    script = re.compile(r"(?:.*/)?python (?:-m )?(train|sample|figures\.\w+)(?:\.py)?(?: (.*))?")
    called = [command for command in commands if re.search("python (?!-m pytest)", command)]
    found = [script.fullmatch(command) for command in called]
    assert all(found), called
    for command in found:
        with pytest.raises(SystemExit, match="understood"):
            importlib.import_module(command[1]).main(shlex.split(command[2] or ""))
    assert len(found) >= 20


def test_every_link_leads_somewhere():
    """Files and headings that the texts link to are in the repo, and what the README names is in
    the code."""
    for path, text in TEXTS.items():
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            there = path.parent / target if target else path
            assert there.exists(), f"{path.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.+)", there.read_text(), re.M)
                assert heading in (title.lower().replace(" ", "-") for title in titles), heading
    named = set(re.findall(r"`((?:hfd|train|sample|entropy)\.(?!py\b|hfd\b)[A-Za-z_.]+)`", README))
    for module, inside in (name.split(".", 1) for name in named):
        operator.attrgetter(inside)(importlib.import_module(module))
    assert len(named) >= 20


def test_the_texts_stay_readable():
    """The README is short, and no line is too long to be read beside another file."""
    assert (ROOT / "README.md").stat().st_size <= 20_000
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("figures/*.py")):
        longest = max(map(len, path.read_text().splitlines()))
        assert longest <= 100, path.name
    for path, text in TEXTS.items():            # prose: neither tables nor links nor code
        for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
            assert len(line) <= 120 or line[0] == "|" or "](" in line, f"{path.name}: {line}"


def test_the_method_in_40_lines(tmp_path, monkeypatch, capsys):
    """The README's code runs as it stands, and prints what the README says. Its picture is a
    sample: near, not as near as x_hat."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert code.count("\n") <= 40
    exec(code, names := {})
    printed, (told,) = capsys.readouterr().out, re.findall(r"It prints `(.*)`", README)
    assert numbers(told) == pytest.approx(numbers(printed), abs=0.1)
    assert told.split()[0] == printed.split()[0]            # bits are the same everywhere
    x, x_hat, x_sample = (names[name] for name in ("x", "x_hat", "x_sample"))
    assert x_sample.shape == x.shape and x_sample.abs().max() <= 1
    rms, rms_hat = ((t - x).square().mean().sqrt() for t in (x_sample, x_hat))
    assert rms_hat < rms < 0.2                              # 20 dB, on a scale of -1 to 1


def test_numbers_in_the_readme_come_from_the_results(shipped):
    """The README's table of results repeats figures/rate_distortion.json to the digit, and that was
    measured with the model that ships."""
    rows = re.findall(r"^\| [1-6] (?:\| [\d.]+ ){3}.*", README, re.M)
    results = json.loads((ROOT / "figures" / "rate_distortion.json").read_text())
    assert len(rows) == len(shipped.autoencoder.lambdas)
    for row in rows:
        level, *told = re.findall(r"[\d.]+", row)
        scores = results["points"][f"level {level}"]["variants"]
        a, h = scores["autoencoder"], scores["HFD"]
        plus = results["points"][f"level {level}, HFD+"]["variants"]["HFD+"]
        ratios = [*metrics.ratio(h, a), *metrics.ratio(plus, a)]
        assert told == [f"{a['bpp']:.3f}", f"{a['psnr']:.2f}", f"{h['psnr']:.2f}",
                        *(f"{number:.2f}" for number in ratios)]
    weights = common.digest(shipped.autoencoder, shipped.diffusion)
    assert results["about"]["model"]["weights"] == weights


def test_demo(tmp_path):
    """`figures.demo` needs no argument and no screen, whatever a notebook says. It writes a file
    (this process writes the same), its picture and a comparison, and prints what all costs."""
    notebook = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline",
                             "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "figures.demo"], cwd=tmp_path, text=True,
                          capture_output=True, env=notebook)
    assert done.returncode == 0 and "sampling step" in done.stderr, done.stderr
    for word in ("PSNR", "estimated", "payload", "range decoder"):
        assert word in done.stdout
    for name in "JPEG", "autoencoder", "HFD":               # as the README says
        told, printed = (re.search(f"^{name} .*", text, re.M)[0] for text in (README, done.stdout))
        assert numbers(told) == pytest.approx(numbers(printed), abs=0.1)
    written = tmp_path / "runs" / "figures"
    data = (written / "portrait.hfd").read_bytes()
    twin = hfd.load_model(sample.MODEL, find_device())      # where the demo has run
    assert data == sample.compress(common.portrait(), twin, 2)[0] and len(data) < 10_000
    assert Image.open(written / "portrait.png").size == (512, 600)
    assert Image.open(written / "demo.png").width > 2000


def test_shipped_model_says_how_it_was_made(shipped, capsys):
    """The model is small and tells how both stages were made; `info` without a word prints it."""
    assert sum(path.stat().st_size for path in Path(sample.MODEL).glob("*.npz")) < 30 * 2 ** 20
    sample.main(["info"])
    printed = capsys.readouterr().out
    assert shipped.identity.hex() in printed
    for part, stage in (("autoencoder", "autoencoder"), ("denoiser", "diffusion")):
        recipe = shipped.recipes[part]
        assert {"commands", "data", "steps", "hardware", "minutes"} <= recipe.keys()
        assert recipe["commands"][0].startswith(f"python train.py {stage}")
        assert recipe["commands"][0] in printed


def test_shipped_model_spans_the_curve(shipped):
    """From level to level the file grows and the error falls."""
    image, sizes, psnrs = common.portrait().crop((200, 344, 456, 600)), [], []
    for quality in range(1, len(shipped.autoencoder.lambdas) + 1):
        data, report = sample.compress(image, shipped, quality)
        sizes.append(report["file"])
        psnrs.append(metrics.psnr(image, sample.decompress(data, shipped, rho=0)[0]))
    assert sorted(sizes) == sizes and sorted(psnrs) == psnrs
    assert sizes[0] < 0.1 and 0.5 < sizes[-1] < 1.2 and psnrs[0] > 23 and psnrs[-1] > 32


def test_a_sample_is_one_of_many_and_not_tinted(shipped):
    """Two seeds give two pictures from one file; each costs less than theory's 3.01 dB and keeps
    the colours. Its detail is nearer to the picture's than x_hat's is; less noise invents less."""
    crop = common.portrait().crop((288, 432, 416, 560))
    data, _ = sample.compress(crop, shipped, 2)
    blurry, one, two, smooth = (sample.decompress(data, shipped, **settings)[0] for settings in (
        {"rho": 0}, {"seed": 1}, {"seed": 2}, {"seed": 1, "eta": 0.03}))
    real, none, less, full = (np.abs(np.diff(np.asarray(image, int), axis=1)).mean()
                              for image in (crop, blurry, smooth, one))
    assert one != two and less < full and abs(full - real) < abs(none - real)
    for picture in (one, two):
        assert metrics.psnr(crop, blurry) - metrics.psnr(crop, picture) < 3.01
        assert np.abs(np.subtract(picture, crop, dtype=int).mean((0, 1))).max() < 1


def test_default_context_is_enough(shipped):
    """With the default context this crop is less than two grey levels off whole-image sampling
    (more elsewhere: see figures.patches); without context it is far more."""
    x = sample.to_tensor(common.portrait().crop((0, 0, 192, 192)), "cpu")
    x_hat = shipped.autoencoder.decode(shipped.autoencoder.encode(x, 1), 1)
    whole, enough, none = (
        hfd.sample_picture(shipped.diffusion, x_hat, 1, patch=patch, context=context)
        for patch, context in ((192, 0), (96, hfd.CONTEXT), (96, 0)))
    assert (enough - whole).abs().max() < 2 / 127.5 and (none - whole).abs().max() > 3 / 127.5


@pytest.mark.filterwarnings("ignore:TF32")          # PyTorch's, when that library is switched off
def test_pixels_hardly_depend_on_the_machine(shipped, monkeypatch):
    """Pixels come from floating point. In bfloat16, or with sums in another order, they differ by 8
    of 255 at most."""
    data, found = sample.compress(common.portrait().crop((300, 400, 396, 496)), shipped, 2)[0], []
    for bf16, mkldnn in ((False, True), (False, True), (True, True), (False, False)):
        monkeypatch.setattr(hfd, "fast_bf16", lambda device: bf16)
        with torch.backends.mkldnn.flags(enabled=mkldnn):   # without: sums in another order
            found.append(np.asarray(sample.decompress(data, shipped, steps=4)[0], int))
    assert (found[0] == found[1]).all()
    for other in found[2:]:
        difference = np.abs(found[0] - other)
        print(f"pixels differ by {difference.mean():.3f} on average, by {difference.max()} at most")
        assert difference.mean() < 0.5 and difference.max() <= 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_decodes_the_same(shipped):
    """A file made on a CPU decodes on a GPU to the same symbols, and pixels that hardly differ."""
    models = shipped, hfd.load_model(sample.MODEL, "cuda")
    data, _ = sample.compress(common.portrait().crop((300, 400, 492, 592)), shipped, 2)
    header = sample.parse(data, "file")
    k, on_gpu = (sample.decode_latent(header, model, "file")[0].cpu() for model in models)
    a, b = (np.asarray(sample.decompress(data, model)[0], int) for model in models)
    difference = np.abs(a - b)
    print(f"pixels differ by {difference.mean():.3f} on average, by {difference.max()} at most")
    assert (k == on_gpu).all() and difference.mean() < 0.5 and difference.max() <= 8
