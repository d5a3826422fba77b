"""What the tests share: a picture drawn on the spot, and a model so small that it decodes in milliseconds."""
import contextlib
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))      # the modules lie beside tests/, not in a package

import entropy
import hfd
import sample
import train


@pytest.fixture(scope="session")
def photo():
    """A drawn picture with a photograph's statistics and sides that are no multiples of anything: 100x75."""
    return Image.fromarray(train.dead_leaves(100, np.random.default_rng(0))).crop((0, 0, 100, 75))


def sealed(payload, quality=1, block=0, width=32, height=16, seed=0, identity=bytes(4), version=sample.VERSION):
    """A file that says what we like, with a checksum that is right."""
    header = sample.HEADER.pack(sample.MAGIC, version, quality, block, width, height, seed, identity)
    return header + struct.pack(">I", zlib.crc32(header + payload)) + payload


@contextlib.contextmanager
def memory_within(megabytes):
    """Fail if at any moment inside it this process holds so much more memory than at the beginning."""
    status = lambda name: next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) / 1000
    try:
        Path("/proc/self/clear_refs").write_text("5")       # Linux forgets the peak so far on demand
    except OSError:
        yield                                               # other systems cannot say
        return
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < megabytes


@pytest.fixture(scope="session")
def model(tiny_model):
    """The tiny checkpoint, loaded."""
    return hfd.load_model(tiny_model)


@pytest.fixture(scope="session")
def tiny_model(photo, tmp_path_factory):
    """Path of a checkpoint with three quality levels. Nothing in it is trained: the transform is the lapped DCT it starts
    from, and the denoiser's zero-initialised layers are filled with a little noise, so that it does something."""
    torch.manual_seed(0)
    autoencoder = hfd.Autoencoder(hfd.AutoencoderConfig((0.001, 0.004, 0.016), 24, (8, 8, 8, 8), (0, 0, 0, 1)))
    with torch.no_grad():
        autoencoder.prior.fit_scale(autoencoder.analysis(sample.to_tensor(photo, "cpu"), torch.tensor([0])))
        for weights, value in ((autoencoder.prior.near, 0.25), (autoencoder.prior.shift, 0.5), (autoencoder.prior.across, 0.02)):
            weights.fill_(value)                            # some context
    diffusion = hfd.Diffusion(hfd.DiffusionConfig(levels=3, widths=(8, 16), blocks=1))
    for weight in diffusion.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    tables = entropy.freeze(autoencoder.prior, autoencoder.log_step.exp())
    packed = hfd.pack(autoencoder, tables, diffusion, {"autoencoder": {"note": "untrained, for tests"}})
    hfd.write_atomically(str(path), lambda f: torch.save(packed, f))
    return str(path)
