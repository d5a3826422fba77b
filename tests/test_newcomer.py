"""What someone meets who has just cloned the repo: the README's commands, the demo, the model that ships."""
import argparse
import importlib
import json
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
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip()] + re.findall(r"`(python [^`]+)`", README)


@pytest.fixture(scope="module")
def shipped():
    return hfd.load_model(sample.MODEL)


@pytest.fixture(scope="module")
def portrait():
    from matplotlib.cbook import get_sample_data
    with get_sample_data("grace_hopper.jpg") as f:
        return sample.open_picture(f)[0]


class Parsed(Exception):
    """Stops a script when it has understood its flags."""


def test_every_command_in_the_readme_exists(monkeypatch):
    """Each command of the README, in a block or in a sentence, names a script that is there and flags that it has."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv=None):
        parse_args(parser, argv)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    checked = 0
    for command in COMMANDS:
        for part in command.split("&&"):
            words = shlex.split(part)
            words = words[words.index("--nproc_per_node") + 2:] if words[0] == "torchrun" else words[1:]
            if words and (words[0] in ("sample.py", "train.py") or words[0] == "-m" and words[1].startswith("figures.")):
                module, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
                with pytest.raises(Parsed):
                    importlib.import_module(module).main(argv)
                checked += 1
    assert checked >= 30


def test_every_link_in_the_readme_leads_somewhere():
    """Files that the README links to are in the repo; functions that its maps name are in the code, in the lines that they link to."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    named = re.findall(r"`(hfd|train|sample|entropy)\.([A-Za-z_.]+)`(?:\]\([a-z]+\.py#L(\d+)\))?", README)
    assert sum(bool(line) for _, _, line in named) >= 20
    for module, path, line in named:
        if path == "py":
            continue
        thing = {"hfd": hfd, "train": train, "sample": sample, "entropy": entropy}[module]
        for name in path.split("."):
            assert hasattr(thing, name), f"{module}.{path}"
            thing = getattr(thing, name)
        if line:
            text = (ROOT / f"{module}.py").read_text().splitlines()[int(line) - 1]
            assert re.match(rf" *(def|class) {name}\b", text), f"{module}.{path} is not in line {line}"


def test_numbers_in_the_readme_come_from_the_results(shipped):
    """The README's tables of results repeat figures/rate_distortion.json to the digit, and speak of the model that ships."""
    results = json.loads((ROOT / "figures" / "rate_distortion.json").read_text())
    weights = hfd.fingerprint(shipped.autoencoder.state_dict(), shipped.diffusion.state_dict()).hex()[:16]
    for path in (ROOT / "figures").glob("*.json"):
        about = json.loads(path.read_text()).get("about")
        assert not about or about["model"]["weights"] == weights, f"{path.name} was measured with another model"
    assert shipped.recipe["measured"]["level 1"].endswith("FD {:.1f}".format(results["points"]["level 1"]["variants"]["HFD"]["fd"]))
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.M)
    assert len(rows) == 6
    for level, bpp, psnr_a, psnr_h, fd_a, fd_h in rows:
        a, h = (results["points"][f"level {level}"]["variants"][name] for name in ("autoencoder", "HFD"))
        assert (bpp, psnr_a, psnr_h) == (f"{a['bpp']:.3f}", f"{a['psnr']:.2f}", f"{h['psnr']:.2f}")
        assert (fd_a, fd_h) == (f"{a['fd']:.1f}", f"{h['fd']:.1f}")
    others = [name.strip().replace("BPG", "BPG 4:4:4") for name in re.search(r"^\| ours \|(.*)\|$", README, re.M)[1].split("|")]
    rows = re.findall(r"^\| ((?:autoencoder|HFD)(?:, refined)?), equal (PSNR|FD) \|(.*)\|$", README, re.M)
    assert len(rows) == 6
    for ours, quality, cells in rows:
        differences = {other: f"{bd:+.1f}" for other, bd in results["summary"][f"bits_at_equal_{quality.lower()}_percent"][ours].items() if other in others}
        assert dict(zip(others, map(str.strip, cells.split("|")))) == {other: differences.get(other, "") for other in others}


def test_demo(tmp_path):
    """`sample.py demo` needs no argument: it writes a file, its picture and a comparison, and prints what everything costs."""
    output = subprocess.run([sys.executable, str(ROOT / "sample.py"), "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr
    for word in ("JPEG", "autoencoder", "HFD", "PSNR", "estimated", "payload", "range decoder", "diffusion"):
        assert word in output.stdout
    assert "sampling step" in output.stderr
    assert (tmp_path / "demo" / "portrait.hfd").stat().st_size < 10_000
    assert Image.open(tmp_path / "demo" / "portrait.png").size == (512, 600)
    assert Image.open(tmp_path / "demo" / "comparison.png").width > 2000


def test_shipped_model_says_how_it_was_made(shipped, capsys):
    """The checkpoint is small, carries the commands, data, seed, steps and hardware of both stages, and `info` prints them."""
    assert (ROOT / "checkpoints" / "hfd.pt").stat().st_size < 25 * 2 ** 20
    sample.main(["info", "--model"])
    printed = capsys.readouterr().out
    for stage in ("autoencoder", "diffusion"):
        recipe = shipped.recipe[stage]
        assert {"command", "data", "seed", "steps", "hardware", "minutes"} <= recipe.keys()
        assert recipe["command"].startswith(f"python train.py {stage}") and recipe["command"] in printed


def test_shipped_model_spans_the_curve(shipped, portrait):
    """From level to level the file grows and the error falls; coded size stays within 0.2 % + 16 bytes of the cross-entropy."""
    x, sizes, errors = sample.to_tensor(portrait, "cpu"), [], []
    for q in range(len(shipped.autoencoder.config.lambdas)):
        k = shipped.autoencoder.encode(x, q)
        data = entropy.encode(k[0].numpy(), shipped.tables, q)
        assert (entropy.decode(data, shipped.tables, q, k[0].shape) == k[0].numpy()).all()
        bound = entropy.coded(k[0].numpy(), shipped.tables, q).bits / 8
        assert abs(len(data) - bound) <= 0.002 * bound + 16
        sizes.append(8 * len(data) / (portrait.width * portrait.height))
        errors.append(-sample.psnr(portrait, sample.to_image(shipped.autoencoder.decode(k, q), *portrait.size)))
    assert sorted(sizes) == sizes and sorted(errors, reverse=True) == errors
    assert sizes[0] < 0.1 and 0.6 < sizes[-1] < 1 and -errors[0] > 25 and -errors[-1] > 33.9


def test_a_sample_is_one_of_many_and_not_tinted(shipped, portrait):
    """Two seeds give two pictures from one file; each costs less than theory's 3.01 dB and keeps the colours; less noise and
    fewer steps mean less invented detail."""
    crop = portrait.crop((256, 400, 512, 600))
    data, _ = sample.compress(crop, shipped, 2)
    blurry, one, two, smooth = (sample.decompress(data, shipped, **settings)[0] for settings in (
        {"rho": 0}, {"seed": 1}, {"seed": 2}, {"seed": 1, "eta": 0.03, "steps": 4}))
    detail = lambda image: np.abs(np.diff(np.asarray(image, float), axis=1)).mean()
    assert one != two and detail(one) > detail(smooth)
    for picture in (one, two):
        assert sample.psnr(crop, blurry) - sample.psnr(crop, picture) < 3.01
        assert np.abs(np.asarray(picture, float).mean((0, 1)) - np.asarray(blurry, float).mean((0, 1))).max() < 1


def test_default_context_is_enough(shipped, portrait):
    """With the default context, no pixel of patch-wise sampling is a grey level off whole-image sampling; with none, some are by many."""
    crop = portrait.crop((0, 0, 320, 320))
    x_hat = shipped.autoencoder.decode(shipped.autoencoder.encode(sample.to_tensor(crop, "cpu"), 1), 1)
    run = lambda patch, context: hfd.sample_picture(shipped.diffusion, x_hat, 1, patch=patch, context=context)
    whole = run(320, 0)
    error = {context: (run(160, context) - whole).abs().max().item() * 127.5 for context in (0, hfd.CONTEXT)}
    assert error[hfd.CONTEXT] < 1 and error[0] > 3


@pytest.mark.filterwarnings("ignore:TF32")                  # PyTorch's, when that library is switched off
def test_pixels_hardly_depend_on_the_machine(shipped, portrait, monkeypatch, capsys):
    """Symbols decode identically everywhere; pixels come from floating point, and may differ between settings, but not so that one sees it."""
    crop = portrait.crop((300, 400, 492, 592))
    data, _ = sample.compress(crop, shipped, 2)
    decode = lambda **settings: np.asarray(sample.decompress(data, shipped, **settings)[0], int)
    usual, threads = decode(), torch.get_num_threads()
    assert (decode() == usual).all()                    # the same settings: the same pixels
    other = {"four patches in a batch": (decode(patch=64, batch=4), decode(patch=64))}
    torch.set_num_threads(1 if threads > 1 else 2)
    other["another number of threads"] = decode(), usual
    torch.set_num_threads(threads)
    both = []
    for bf16 in (True, False):
        monkeypatch.setattr(hfd, "fast_bf16", lambda device: bf16)
        both.append(decode())
    other["bfloat16 or float32"] = both
    with torch.backends.mkldnn.flags(enabled=False):        # sums in another order, as another kind of machine has them
        other["another library's convolutions, in float32"] = decode(), both[1]
    with capsys.disabled():
        for name, (a, b) in other.items():
            print(f"\n{name}: pixels differ by {np.abs(a - b).mean():.3f}/255 on average, {np.abs(a - b).max()}/255 at most", end="")
            assert np.abs(a - b).mean() < 0.5 and np.abs(a - b).max() <= 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_decodes_the_same(shipped, portrait, capsys):
    """A file made on a CPU decodes on a GPU to the same symbols, and to pixels that hardly differ."""
    crop, gpu = portrait.crop((300, 400, 492, 592)), hfd.load_model(sample.MODEL, "cuda")
    data, _ = sample.compress(crop, shipped, 2)
    k, on_gpu = (sample.decode_latent(sample.parse(data, "file"), model, "file")[0].cpu() for model in (shipped, gpu))
    assert (k == on_gpu).all()
    a, b = (np.asarray(sample.decompress(data, model)[0], int) for model in (shipped, gpu))
    with capsys.disabled():
        print(f"\nCPU or GPU: pixels differ by {np.abs(a - b).mean():.3f}/255 on average, {np.abs(a - b).max()}/255 at most", end="")
    assert np.abs(a - b).mean() < 0.5 and np.abs(a - b).max() <= 8
