"""What the tests share: a drawn picture, and a model so small that it decodes in milliseconds."""
import contextlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))      # the modules lie beside tests/

import hfd
import sample
import train

torch.set_num_threads(1)                # networks are tiny here: threads would wait for each other
find_device = sample.pick_device        # "auto" is the CPU here: a GPU's pixels are its own
sample.pick_device = lambda name="auto": find_device("cpu" if name == "auto" else name)


@pytest.fixture(scope="session")
def photo():
    """A drawn picture with a photograph's statistics, 100x75: multiples of nothing."""
    return Image.fromarray(train.dead_leaves(100, np.random.default_rng(0))).crop((0, 0, 100, 75))


@pytest.fixture(scope="session")
def tiny_model(photo, tmp_path_factory):
    """Path of an untrained model's folder, with three quality levels: the lapped transform that an
    autoencoder starts from, and a denoiser whose zeros are filled with a little noise."""
    torch.manual_seed(0)
    folder, recipe = tmp_path_factory.mktemp("model"), {"note": "untrained, for tests"}
    config = hfd.AutoencoderConfig((0.001, 0.004, 0.016), 24, (8, 8, 8, 8), (0, 0, 0, 1))
    autoencoder = hfd.Autoencoder(config).requires_grad_(False)
    y = autoencoder.analysis(sample.to_tensor(photo, "cpu"), torch.tensor([0]))
    autoencoder.prior.fit_scale(y)
    autoencoder.prior.shift.fill_(0.5)                      # some context
    hfd.save_part(folder / "autoencoder.npz", autoencoder, recipe)
    diffusion = hfd.DiffusionPlus(hfd.DiffusionConfig(3, widths=(8, 16), blocks=(1, 1)))
    for p in diffusion.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    identity = hfd.load_model(folder).identity.hex()
    hfd.save_part(folder / "denoiser.npz", diffusion, recipe, autoencoder=identity)
    return str(folder)


@pytest.fixture(scope="session")
def model(tiny_model):
    """The tiny model, loaded."""
    return hfd.load_model(tiny_model)


def contents(folder):
    """{name: bytes, or where a link points, or False for a folder}."""
    return {p.name: os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes()
            for p in folder.iterdir()}


def refusal(function, *arguments):
    """The text with which a call is refused: an HFDError of one line that says something."""
    with pytest.raises(hfd.HFDError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert len(text) > 10 and len(text.splitlines()) == 1
    return text


@contextlib.contextmanager
def memory_within(megabytes):
    """Fail if inside it this process ever holds so much more memory than at the beginning."""
    def peak():
        """The most so far, in megabytes."""
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000
    before = None
    with contextlib.suppress(OSError):                      # only Linux can forget the peak
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
    yield
    assert before is None or peak() - before < megabytes
