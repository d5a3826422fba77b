"""What someone meets who has just cloned the repo: the README, the demo, the model that ships."""
import argparse
import importlib
import json
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

import entropy
import hfd
import sample

ROOT = Path(__file__).parent.parent
TEXTS = {path: path.read_text() for pattern in ("*.md", "figures/*.md", "checkpoints/*.md")
         for path in sorted(ROOT.glob(pattern))}
README = TEXTS[ROOT / "README.md"]


@pytest.fixture(scope="module")
def shipped():
    """The model that ships, loaded."""
    return hfd.load_model(sample.MODEL)


@pytest.fixture(scope="module")
def portrait():
    """The picture of the demo."""
    return sample.portrait()


def pixels(image):
    """A PIL image as an array of integers."""
    return np.asarray(image).astype(int)


# The texts ----------------------------------------------------------------------------------------


class Parsed(Exception):
    """Stops a script when it has understood its flags."""


def test_every_command_in_the_texts_exists(monkeypatch):
    """Each command, in a block or in a sentence, names a script that is there and flags it has."""
    parse_args, commands = argparse.ArgumentParser.parse_args, []

    def parse_and_stop(parser, argv=None):
        parse_args(parser, argv)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for text in TEXTS.values():
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
        inline = [line for line in re.findall(r"`(python [^`]+)`", text) if "..." not in line]
        for line in blocks.splitlines() + inline:
            commands += [part.strip() for part in line.split("#")[0].split("&&")]
    script = re.compile(r"(?:.*/)?python (?:-m )?(train|sample|figures\.\w+)(?:\.py)?(?: (.*))?")
    found = [match for match in map(script.fullmatch, commands) if match]
    for command in found:
        with pytest.raises(Parsed):
            importlib.import_module(command[1]).main(shlex.split(command[2] or ""))
    assert len(found) >= 20


def test_every_link_leads_somewhere():
    """Files that the texts link to are in the repo, and what the README names is in the code."""
    for path, text in TEXTS.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
    named = set(re.findall(r"`((?:hfd|train|sample|entropy)\.(?!py\b|hfd\b)[A-Za-z_.]+)`", README))
    for name in named:
        thing = importlib.import_module(name.split(".")[0])
        for part in name.split(".")[1:]:
            assert hasattr(thing, part), name
            thing = getattr(thing, part)
    assert len(named) >= 20


def test_the_texts_stay_readable():
    """The README is short, and no line is too long to be read beside another file."""
    assert (ROOT / "README.md").stat().st_size <= 20_000
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("figures/*.py")]:
        long = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not long, f"{path.name}, lines {long}"
    for path, text in TEXTS.items():            # prose: neither tables nor links nor code
        lines = re.sub(r"```.*?```", "", text, flags=re.S).splitlines()
        long = [line for line in lines if len(line) > 120 and line[0] != "|" and "](" not in line]
        assert not long, path.name


def test_the_method_in_40_lines(tmp_path, monkeypatch):
    """The README's code runs as it stands. Its picture is near the original, and a sample: not as
    near as the autoencoder's."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert code.count("\n") <= 45
    exec(code, names := {})
    x, x_hat, x_sample = (names[name] for name in ("x", "x_hat", "x_sample"))
    assert x_sample.shape == x.shape and x_sample.abs().max() <= 1
    rms, rms_hat = ((t - x).square().mean().sqrt() for t in (x_sample, x_hat))
    assert rms_hat < rms < 0.2                              # 20 dB, on a scale of -1 to 1


def test_numbers_in_the_readme_come_from_the_results():
    """The README's table of results repeats figures/rate_distortion.json to the digit."""
    rows = re.findall(r"^\| [1-6] (?:\| [\d.]+ ){5}", README, re.M)
    points = json.loads((ROOT / "figures" / "rate_distortion.json").read_text())["points"]
    for row in rows:
        level, *told = re.findall(r"[\d.]+", row)
        a, h = (points[f"level {level}"]["variants"][name] for name in ("autoencoder", "HFD"))
        assert told == [f"{a['bpp']:.3f}", f"{a['psnr']:.2f}", f"{h['psnr']:.2f}", f"{h['fd']:.1f}",
                        f"{h['fd'] / a['fd']:.2f}"]


# The model that ships -----------------------------------------------------------------------------


def test_demo(tmp_path, shipped, portrait):
    """`sample.py demo` needs no argument, and no screen, whatever a notebook says: it writes a file
    (this process writes the same), its picture and a comparison, and prints what all costs."""
    done = subprocess.run([sys.executable, ROOT / "sample.py", "demo"], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"MPLBACKEND": "module://nowhere"})
    assert done.returncode == 0 and "sampling step" in done.stderr, done.stderr
    for word in ("JPEG", "autoencoder", "HFD", "PSNR", "estimated", "payload", "range decoder"):
        assert word in done.stdout
    data = (tmp_path / "demo" / "portrait.hfd").read_bytes()
    assert data == sample.compress(portrait, shipped, 2)[0] and len(data) < 10_000
    assert Image.open(tmp_path / "demo" / "portrait.png").size == (512, 600)
    assert Image.open(tmp_path / "demo" / "comparison.png").width > 2000


def test_shipped_model_says_how_it_was_made(shipped, capsys):
    """The model is small, carries commands, data, steps and hardware of both stages, and `info`,
    without being told of what, prints them."""
    assert sum(path.stat().st_size for path in Path(sample.MODEL).glob("*.npz")) < 30 * 2 ** 20
    sample.main(["info"])
    printed = capsys.readouterr().out
    for part, stage in (("autoencoder", "autoencoder"), ("denoiser", "diffusion")):
        recipe = shipped.recipes[part]
        assert {"commands", "data", "steps", "hardware", "minutes"} <= recipe.keys()
        assert recipe["commands"][0].startswith(f"python train.py {stage}")
        assert recipe["commands"][0] in printed and shipped.identity.hex() in printed


def test_shipped_model_spans_the_curve(shipped, portrait):
    """From level to level the file grows and the error falls; every latent comes back, and its
    bytes stay within 0.2 % + 16 of the cross-entropy."""
    image, sizes, psnrs = portrait.crop((200, 344, 456, 600)), [], []
    x = sample.to_tensor(image, "cpu")
    for q in range(len(shipped.autoencoder.lambdas)):
        k = shipped.autoencoder.encode(x, q)
        data, bits = entropy.encode(k[0].numpy(), shipped.tables, q)
        assert (entropy.decode(data, shipped.tables, q, k[0].shape) == k[0].numpy()).all()
        assert abs(len(data) - bits / 8) <= 0.002 * bits / 8 + 16
        x_hat = shipped.autoencoder.decode(k, q)
        sizes.append(bits / 256 ** 2)
        psnrs.append(sample.psnr(image, sample.to_image(x_hat, 256, 256)))
    assert sorted(sizes) == sizes and sorted(psnrs) == psnrs
    assert sizes[0] < 0.1 and 0.5 < sizes[-1] < 1.2 and psnrs[0] > 23 and psnrs[-1] > 32


def test_a_sample_is_one_of_many_and_not_tinted(shipped, portrait):
    """Two seeds give two pictures from one file; each costs less than theory's 3.01 dB and keeps
    the colours; less noise and fewer steps mean less invented detail."""
    crop = portrait.crop((256, 400, 448, 592))
    data, _ = sample.compress(crop, shipped, 2)
    blurry, one, two, smooth = (sample.decompress(data, shipped, **settings)[0] for settings in (
        {"rho": 0}, {"seed": 1}, {"seed": 2}, {"seed": 1, "eta": 0.03, "steps": 4}))
    detail = [np.abs(np.diff(pixels(image), axis=1)).mean() for image in (one, smooth)]
    assert one != two and detail[0] > detail[1]
    for picture in (one, two):
        assert sample.psnr(crop, blurry) - sample.psnr(crop, picture) < 3.01
        assert np.abs((pixels(picture) - pixels(blurry)).mean((0, 1))).max() < 1


def test_default_context_is_enough(shipped, portrait):
    """With the default context, no pixel of patch-wise sampling is a grey level off whole-image
    sampling; with none, some are by many."""
    x = sample.to_tensor(portrait.crop((0, 0, 256, 256)), "cpu")
    x_hat = shipped.autoencoder.decode(shipped.autoencoder.encode(x, 1), 1)
    whole, enough, none = (
        hfd.sample_picture(shipped.diffusion, x_hat, 1, patch=patch, context=context)
        for patch, context in ((256, 0), (128, hfd.CONTEXT), (128, 0)))
    assert (enough - whole).abs().max() < 1 / 127.5 and (none - whole).abs().max() > 3 / 127.5


@pytest.mark.filterwarnings("ignore:TF32")          # PyTorch's, when that library is switched off
def test_pixels_hardly_depend_on_the_machine(shipped, portrait, monkeypatch):
    """Symbols decode identically everywhere; pixels come from floating point, and may differ from
    machine to machine, but not so that one sees it."""
    data, _ = sample.compress(portrait.crop((300, 400, 396, 496)), shipped, 2)
    threads, found = torch.get_num_threads(), []
    for bf16, more, mkldnn in ((False, 0, True), (False, 0, True), (True, 0, True),
                               (False, 1, True), (False, 0, False)):    # sums in another order
        monkeypatch.setattr(hfd, "fast_bf16", lambda device: bf16)
        torch.set_num_threads(threads + more)
        with torch.backends.mkldnn.flags(enabled=mkldnn):
            found.append(pixels(sample.decompress(data, shipped, steps=4)[0]))
    torch.set_num_threads(threads)
    assert (found[0] == found[1]).all()
    for other in found[2:]:
        difference = np.abs(found[0] - other)
        assert difference.mean() < 0.5 and difference.max() <= 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_decodes_the_same(shipped, portrait):
    """A file made on a CPU decodes on a GPU to the same symbols, and pixels that hardly differ."""
    models = shipped, hfd.load_model(sample.MODEL, "cuda")
    data, _ = sample.compress(portrait.crop((300, 400, 492, 592)), shipped, 2)
    header = sample.parse(data, "file")
    k, on_gpu = (sample.decode_latent(header, model, "file")[0].cpu() for model in models)
    a, b = (pixels(sample.decompress(data, model)[0]) for model in models)
    assert (k == on_gpu).all() and np.abs(a - b).mean() < 0.5 and np.abs(a - b).max() <= 8
