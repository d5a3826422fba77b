"""Learning: both stages, from any folder of pictures, on a GPU or a laptop.

    python train.py autoencoder --images PHOTOS --out runs/mine
    python train.py diffusion --images PHOTOS --out runs/mine

Each save leaves that stage of a model in runs/mine, ready to use (sample.py --model runs/mine), and
beside it, in *.training.npz, what --resume needs: a run may be stopped (by Ctrl-C, or worse), and
ends where it would have ended uninterrupted, on a CPU bit for bit. Without --images both learn from
*dead leaves*, which this file draws. With several GPUs: torchrun --nproc_per_node N train.py ...
"""
import argparse
import collections
import copy
import functools
import math
import os
import resource
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw

import entropy
import hfd
import sample
from hfd import HFDError

# Pictures to learn from ---------------------------------------------------------------------------
def dead_leaves(size, rng):
    """A dead leaves picture, uint8 (size, size, 3), by a NumPy Generator: discs that fall on one
    another until nothing shows through. The simplest model of why photographs look as they do (Lee,
    Mumford & Huang 2001): objects of all sizes hide each other; the radius r has density r^-3."""
    big = 2 * size                                          # halved in the end, for smooth edges
    canvas, smallest, largest = Image.new("RGB", (big, big)), 6.0, big / 2
    draw = ImageDraw.Draw(canvas)
    # A disc's mean area. Ten times the canvas in all leaves e^-10 of it bare.
    area = 2 * math.pi * smallest ** 2 * math.log(largest / smallest)
    for u, x, y, grey, *others in rng.random((int(10 * (1.2 * big) ** 2 / area), 6)):
        # Inverse transform sampling: if u is uniform, this radius has density ~ r^-3.
        r = (smallest ** -2 + u * (largest ** -2 - smallest ** -2)) ** -0.5
        x, y = (x * 1.2 - 0.1) * big, (y * 1.2 - 0.1) * big
        # A shade of grey: red follows it closely, green and blue stray.
        colour = tuple(int(255 * min(max(grey + 0.3 * (c - 0.5), 0), 1)) for c in (grey, *others))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return np.asarray(canvas.resize((size, size), Image.BOX))


ZOOM, GAMMA = (0.7, 1.5), 0.3       # factors of size; exponents of exposure lie in exp(+-GAMMA)


def varied(crop, size, soft_colour, gamma):
    """A window (3, h, h) in [0, 1] as another camera might have given it, (3, size, size): resized,
    with colour at half the resolution or not, and exposed anew. Photographs that were reduced to
    train on are crisp to the last pixel, in colour too. A denoiser that has seen only these puts
    coloured specks into what cameras give. So a share of the crops varies so, each in its way."""
    crop = crop[None]                                                           # (1, 3, h, h)
    if crop.shape[2] != size:
        crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)
    if soft_colour:
        grey = crop.mean(dim=1, keepdim=True)                                   # (1, 1, size, size)
        colour = F.avg_pool2d(crop - grey, 2)                                  # (1, 3, size / 2, .)
        crop = grey + F.interpolate(colour, scale_factor=2, mode="bilinear")    # (1, 3, size, size)
    return crop[0].clamp(0, 1) ** gamma


def picture_files(folder):
    """The paths of all pictures in a folder and those below it, sorted, or of the one picture that
    is named. Hidden ones (thumbnails, mostly) are left out, and links to folders not followed."""
    if os.path.isfile(folder):
        return [Path(folder)]
    found = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and not any(
        part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in found:
        if path.suffix.lower() in (".heic", ".heif", ".dng", ".cr2", ".nef"):
            print(f"note: {path}: skipped, for Pillow cannot read it", file=sys.stderr)
    return [path for path in found if path.suffix.lower() in Image.registered_extensions()]


class Photos:
    """Every picture of a folder, or 64 dead leaves without one, as uint8 on the device that trains:
    decoding on the fly is what usually starves a GPU. Those with a side below `smallest` are
    continued by mirroring. args: the flags of the command line; reading ends beyond --megapixels.
    HFDError if there is no picture."""

    def __init__(self, args, smallest, device):
        self.variety, self.images, total = args.variety, [], 0
        names = picture_files(args.images) if args.images else [None] * 64
        rng = np.random.default_rng(args.seed)
        rng.shuffle(names)
        for name in names:
            if total > args.megapixels:
                print("warning: not all were read; see --megapixels", file=sys.stderr)
                break
            try:
                array = np.array(sample.open_picture(name)[0]) if name else dead_leaves(256, rng)
            except HFDError as error:
                print(f"warning: {error}; skipped", file=sys.stderr)
                continue
            pad = [(0, max(0, smallest - side)) for side in array.shape[:2]] + [(0, 0)]
            array = np.pad(array, pad, mode="symmetric")                            # (H, W, 3)
            self.images.append(torch.from_numpy(array).permute(2, 0, 1).contiguous().to(device))
            total += array.shape[0] * array.shape[1] / 1e6
        if not self.images:
            raise HFDError(f"{args.images}: no pictures found; other --images, or none, may do")
        kind = "pictures" if args.images else "dead leaves"
        self.description = f"{len(self.images)} {kind}, {total:.0f} megapixels"

    def crops(self, count, size):
        """Random crops (count, 3, size, size) in [-1, 1], mirrored and varied, by torch's seed."""
        batch, share = [], self.variety
        for n, i, j, zoom, soft, light, mirror in torch.rand(count, 7).tolist():
            image = self.images[int(n * len(self.images))]                      # (3, H, W)
            factor = ZOOM[0] * (ZOOM[1] / ZOOM[0]) ** (zoom / share) if zoom < share else 1
            gamma = math.exp(GAMMA * (2 * light / share - 1)) if light < share else 1
            side = min(round(size / factor), *image.shape[1:])
            top, left = int(i * (image.shape[1] - side + 1)), int(j * (image.shape[2] - side + 1))
            crop = image[:, top:top + side, left:left + side].float() / 255     # (3, side, side)
            crop = varied(crop, size, soft < share, gamma)                      # (3, size, size)
            batch.append(crop.flip(2) if mirror < 0.5 else crop)
        return torch.stack(batch) * 2 - 1


# Optimizers ---------------------------------------------------------------------------------------
# Each parameter group of an optimizer has a "peak", of which `fit` makes its learning rate.
# "capturable": a GPU's step may be recorded (see `recorded`); it changes no number.
adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.99), fused=True, capturable=True)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), for the convolutions inside the blocks. A few
    directions dominate the gradient of a matrix; the others, which may matter as much, hardly move.
    So take the nearest matrix with orthonormal rows instead, U V^T if the momentum is U S V^T:
    every direction moves equally far."""

    @torch.no_grad()
    def step(self):
        """Update each parameter (outputs, inputs, 3, 3) by its gradient."""
        for group in self.param_groups:                     # of one shape each: done at once
            ahead = []
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].mul_(0.95).add_(p.grad)
                ahead.append((p.grad + 0.95 * momentum).flatten(1))                 # Nesterov's
            for p, step in zip(group["params"], orthonormal(torch.stack(ahead))):
                p.sub_(group["lr"] * step.view(p.shape))


def orthonormal(matrices):
    """The nearest matrices with orthonormal rows, nearly: (G G^T)^(-1/2) G of each G in (n, rows,
    columns), rows <= columns. Five Newton-Schulz steps: each applies to the singular values a
    polynomial that pulls them towards 1, x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5. As it is odd, all
    of it can be done on the small G G^T, at less than half of the cost."""
    G = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)             # (n, rows, columns)
    gram = G @ G.mT                                                                # (n, rows, rows)
    root = one = torch.eye(gram.shape[1], device=G.device)          # root becomes gram^(-1/2)
    for _ in range(5):
        p = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        root, gram = p @ root, p @ gram @ p
    return root @ G


# The loop that both stages share ------------------------------------------------------------------
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP     # Ctrl-C, a batch queue, a lost terminal


def fit(run, draw):
    """Minimise the "loss" among the means that run.model(*batch) returns by name, with each batch
    from draw(step, crop size, batch size). Every random number of step n comes from the seed and n
    alone: a resumed run sees the very crops and noise that it would have seen."""
    args, bf16 = run.args, hfd.fast_bf16(run.device)
    weights, averages = (list(model.parameters()) for model in (run.model, run.average))

    def learn(rate, share, *batch):
        """Learn from one batch. rate: of the peak learning rate; share: of the new weights in their
        average. Both are tensors: a recording would keep a Python number as it was."""
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
            terms = {name: value.mean() for name, value in run.model(*batch).items()}
        terms["loss"].backward()
        if run.world > 1:                                   # their mean over all GPUs
            for p in run.learned:
                dist.all_reduce(p.grad.div_(run.world))
        terms["gradient"] = torch.nn.utils.clip_grad_norm_(run.learned, 1.0)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, [share] * len(weights))
        return {name: value.detach() for name, value in terms.items()}

    if run.device.type == "cuda" and run.world == 1:    # what waits for other GPUs is not recorded
        learn = recorded(run, learn)
    while run.goes_on():
        step = run.step
        run.seed(step)
        # The last quarter sees crops of twice the side, and a quarter as many: what the net learns
        # near a crop's border, where it lacks context, then weighs less.
        late = step >= 0.75 * args.steps
        size, count = (2 * args.crop, max(1, args.batch // 4)) if late else (args.crop, args.batch)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        rate = min(1, (step + 1) / args.warmup) * cosine
        share = 10 / (step + 11)                            # an average over the last tenth, nearly
        scalars = [torch.full((), number, device=run.device) for number in (rate, share)]
        with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
            batch = draw(step, size, count)
        run.step_done(count * size ** 2, learn(*scalars, *batch))
    run.end()


def recorded(run, learn):
    """The function `learn`, for a GPU that computes faster than Python can tell it what: a step is
    a thousand small kernels, recorded once for each shape (a CUDA graph). Then one call starts them
    all, on the same memory: a new batch is copied to it. Random numbers still follow the seed."""
    calls, graphs = collections.Counter(), {}
    torch.cuda.synchronize(run.device)      # a GPU works through queues, called streams, of which
    torch.cuda.set_stream(torch.cuda.Stream(run.device))    # the default one cannot be recorded

    def call(*tensors):
        """As learn. The first three calls of a shape only run: they create what must outlive a
        recording, such as the optimizers' memory."""
        shape = tuple(a.shape for a in tensors)
        calls[shape] += 1
        if calls[shape] == 4:
            graphs.clear()                                  # that of the other crop size
            graph, inputs = torch.cuda.CUDAGraph(), [a.clone() for a in tensors]
            try:                                            # recording computes nothing yet
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    terms = learn(*inputs)
                graphs[shape] = graph, inputs, terms
            except RuntimeError as error:
                why = error.__context__ or error
                run.say(f"note: steps are not recorded, which makes them slow ({why})", sys.stderr)
        if shape not in graphs:
            return learn(*tensors)
        graph, inputs, terms = graphs[shape]
        torch._foreach_copy_(inputs, tensors)
        graph.replay()
        return {name: value.clone() for name, value in terms.items()}
    return call


class Run:
    """What surrounds the loop: seeds, several GPUs, progress, signals, saving and resuming. `step`
    counts steps done; `status` is 0 or what to exit with; more: what else to tell in what ships."""

    def __init__(self, args, device, model, optimizers, photos, **more):
        self.args, self.device, self.model, self.optimizers = args, device, model, optimizers
        self.photos, self.more, self.status, self.seen = photos, more, 0, []
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.learned = [p for p in model.parameters() if p.requires_grad]
        # The average of the weights over the last tenth of all steps is a better model than those
        # of any one step (a memory that grows with training: Karras et al. 2024, section 3.1).
        self.average = copy.deepcopy(model)
        self.step, self.gigapixels = args.recipe["steps"], args.recipe["gigapixels"]
        self.begin = time.time() - 60 * args.recipe["minutes"]
        if args.resume:
            self.load()
        self.mark = time.time()                             # when the next line of progress begins
        self.say(photos.description)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.stop)

    def stop(self, number, frame):
        """A signal ends the loop after the step that it is in."""
        self.status = self.status or 128 + number

    def seed(self, number):
        """Seed everything random anew for this number, differently on each GPU."""
        torch.manual_seed((self.args.seed * 1_000_003 + number) * self.world + self.rank)

    def goes_on(self):
        """Whether there is another step to take. All GPUs must leave the loop at the same one."""
        stopped = self.status
        if self.world > 1:
            stopped = torch.tensor(stopped, device=self.device)
            dist.all_reduce(stopped, dist.ReduceOp.MAX)
            self.status = self.status or int(stopped)       # which all shall exit with
        return self.step < self.args.steps and not stopped

    def step_done(self, pixels, terms):
        """Count a step; now and then tell of it and save."""
        self.step, self.gigapixels = self.step + 1, self.gigapixels + pixels * self.world / 1e9
        # To ask a GPU for a number is to wait for it: so they stay there until a line wants them.
        self.seen.append(terms)
        due = self.step == 1 or self.step % self.args.save_every == 0
        if due and self.step < self.args.steps:             # from step 1 on there is what to resume
            self.save()
        elif self.step % self.args.log_every == 0:
            self.tell()

    def tell(self):
        """A line of progress, with means since the last one. HFDError if one is not a number."""
        means = {name: torch.stack([terms[name] for terms in self.seen]).mean().item()
                 for name in self.seen[0]}
        if not all(map(math.isfinite, means.values())):
            raise HFDError(f"step {self.step}: the loss is {means['loss']}, the gradient "
                           f"{means['gradient']}; the last save may be spoiled, too: start anew, "
                           f"with a lower --lr than {self.args.lr}")
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        pace = len(self.seen) / (time.time() - self.mark)                           # steps a second
        hours = (self.args.steps - self.step) / pace / 3600
        self.say(f"step {self.step:6d}/{self.args.steps}  {numbers}  {pace:.2f} steps/s  "
                 f"{self.gigapixels:.4f} gigapixels  {hours:.2f} hours left")
        self.seen, self.mark = [], time.time()

    def say(self, words, stream=None):
        """Print a line. Where that is no longer possible (a closed pipe, a full disk), stop."""
        try:
            if self.rank == 0:
                print(words, file=stream, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")
            self.status = self.status or 1

    def tensors(self):
        """{name: tensor} of all that a step changes: weights, average, the optimizers' memory."""
        names = {p: name for name, p in self.model.named_parameters()}
        return ({f"model.{name}": a for name, a in self.model.state_dict().items()}
                | {f"average.{name}": a for name, a in self.average.state_dict().items()}
                | {f"optimizer.{key}.{names[p]}": a for optimizer in self.optimizers
                   for p, state in optimizer.state.items() for key, a in state.items()})

    def save(self):
        """Write what --resume needs, and then what ships."""
        if self.seen:
            self.tell()                                     # which finds what is not a number
        if self.rank == 0:
            recipe = self.args.recipe | {
                "data": self.photos.description, "hardware": hardware(self.device),
                "torch": str(torch.__version__), "steps": self.step,
                "gigapixels": round(self.gigapixels, 9), "minutes": (time.time() - self.begin) / 60}
            hfd.write_archive(self.args.state, {"recipe": recipe}, self.tensors())
            hfd.save_part(self.args.part, self.average, recipe, **self.more)

    def load(self):
        """Take over what an earlier run saved. HFDError if it does not fit."""
        _, arrays = hfd.read_archive(self.args.state)
        if self.step:                                       # the optimizers have a memory, too:
            for p in self.learned:                          # a step of length 0 makes room for it
                p.grad = torch.zeros_like(p)
            for optimizer in self.optimizers:
                optimizer.step()
        tensors = self.tensors()
        mine, theirs = ({name: a.shape for name, a in part.items()} for part in (tensors, arrays))
        if mine != theirs:
            raise HFDError(f"{self.args.state}: cannot be resumed, for it is of other networks")
        for name, a in tensors.items():
            a.copy_(torch.from_numpy(arrays[name]))

    def end(self):
        """Save, say how it ended, and exit with a status that says so, too."""
        self.save()
        words = f"at step {self.step}; saved {self.args.part}. {peak_memory(self.device)}"
        if self.step >= self.args.steps:
            return self.say("finished " + words)
        self.say(f"stopped {words}; --resume goes on", sys.stderr)
        sys.exit(self.status)


def hardware(device):
    """What this runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "?")
    words = f"{device.type.upper()}, {name}, {torch.get_num_threads()} threads"
    return words + (", bfloat16" if hfd.fast_bf16(device) else "")


def peak_memory(device):
    """The most memory that this process has held so far, in words."""
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20                         # bytes or KiB
    words = f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"
    if device.type == "cuda":
        words += f", on the GPU {torch.cuda.max_memory_reserved(device) / 2 ** 30:.2f} GiB"
    return words


# Stage 1: rate + lambda * MSE ---------------------------------------------------------------------
def train_autoencoder(args, device, known):
    """Transforms, steps and prior, all levels at once (Balle et al. 2017). known: None or the
    hfd.Model to start from; if that has another prior, only the prior is learned."""
    photos = Photos(args, 2 * args.crop, device)
    config = known.autoencoder.config if known else hfd.AutoencoderConfig()
    model = hfd.Autoencoder(replace(config, prior=args.prior))
    model.to(device, memory_format=torch.channels_last)
    if known:
        model.load_state_dict(known.autoencoder.state_dict(), strict=False)         # what fits
        if config.prior != args.prior:
            model.requires_grad_(False).prior.requires_grad_(True)
    else:
        x, q = photos.crops(32, args.crop), torch.zeros(32, dtype=torch.long, device=device)
        with torch.no_grad():
            model.prior.fit_scale(model.analysis(x, q))
    # The linear path starts at a good place: it is refined, ten times slower than the rest. The
    # prior has octaves, and weights that grow a hundredfold: they may move ten times as fast.
    by_scale = {0.1: [], 1: [], 10: []}
    for name, p in model.named_parameters():
        by_scale[0.1 if "linear" in name else 10 if name.startswith("prior") else 1].append(p)
    groups = [{"params": ps, "peak": args.lr * scale} for scale, ps in by_scale.items()]

    def draw(step, size, count):
        """Random crops x (B, 3, size, size), each at a random level q (B,)."""
        q = torch.randint(len(config.lambdas), (count,), device=device)             # (B,)
        return photos.crops(count, size), q

    fit(Run(args, device, model, [adam(groups)], photos), draw)


# Stage 2: the diffusion model, given reconstructions ----------------------------------------------
MARGIN = 16     # how much larger, all round, the crop is that x_hat is made of: borders are worse
POOL = 16       # steps that draw from one pool of POOL / 4 batches: each pair serves about four


def train_diffusion(args, device, known):
    """The denoiser, on pairs of crops and their reconstructions by the autoencoder in args.out. One
    step: `draw` takes (x, q, x_hat) from a pool, and `fit` calls the model on it; that is the
    `forward` of hfd.DiffusionPlus, which leads to that of hfd.Diffusion. known: None or the
    hfd.Model whose denoiser to start from. HFDError if it has none that fits."""
    base, old = hfd.load_model(args.out, device), known and known.diffusion
    autoencoder, levels = base.autoencoder, len(base.autoencoder.lambdas)
    asked = {flag: value for flag in ("kind", "eta", "objective") if (value := vars(args)[flag])}
    config = replace(old.config if old else hfd.DiffusionConfig(levels=levels), **asked)
    if known and (not old or (old.config.kind, config.levels) != (config.kind, levels)):
        raise HFDError(f"{args.init}: has no denoiser of that kind, for as many quality levels")
    model = hfd.DENOISERS[config.kind](config).to(device, memory_format=torch.channels_last)
    photos = Photos(args, 2 * (args.crop + MARGIN), device)

    @torch.no_grad()
    def pairs(x, q):
        """Crops (x, x_hat), (B, 3, size, size), cut out of larger ones x, (B, 3, size + 2 MARGIN,
        size + 2 MARGIN), at levels q (B,): made from rounded latents, as the decoder does."""
        k = (autoencoder.analysis(x, q) / autoencoder.step(q)).round()              # (B, M, h, w)
        x_hat = autoencoder.synthesis(autoencoder.dequantize(k, q), q).clamp(-1, 1)
        return [a[..., MARGIN:-MARGIN, MARGIN:-MARGIN] for a in (x, x_hat)]

    if old:
        model.load_state_dict(old.state_dict())
    crops = photos.crops(256, args.crop + 2 * MARGIN)           # (256, 3, ., .), for every level
    for level in range(levels):
        q = torch.full((16,), level, device=device)
        gaps = torch.cat([torch.sub(*pairs(part, q)) for part in crops.split(16)])
        model.residual_std[level] = hfd.to_planes(gaps).square().mean(dim=(0, 2, 3)).sqrt()
    blocks, rest = collections.defaultdict(list), []        # Muon's, by shape, and Adam's
    for name, p in model.named_parameters():
        (blocks[p.shape] if p.ndim == 4 and ".conv" in name else rest).append(p)
    groups = [{"params": ps, "peak": 10 * args.lr} for ps in blocks.values()]
    optimizers = [adam([{"params": rest, "peak": args.lr}]), Muon(groups, {"lr": 0.0})]
    run = Run(args, device, model, optimizers, photos, autoencoder=base.identity.hex())

    @functools.lru_cache(1)
    def pool(number, size, count):
        """(x, q, x_hat) for POOL steps: an x_hat is dear, but serves several draws of noise. All
        depends on the number alone, so a run may be resumed half-way through a pool."""
        run.seed(-1 - number)
        q = torch.randint(levels, (POOL // 4 * count,), device=device)              # (N,)
        made = [pairs(photos.crops(count, size + 2 * MARGIN), part) for part in q.split(count)]
        x, x_hat = (torch.cat(each) for each in zip(*made))                # (N, 3, size, size) each
        return x, q, x_hat

    def draw(step, size, count):
        """Pairs from the pool: (x, q, x_hat) of a batch."""
        given = pool(step // POOL, size, count)
        run.seed(step)                                      # again, if this step made the pool
        chosen = torch.randperm(POOL // 4 * count, device=device)[:count]           # (B,)
        return [each[chosen] for each in given]

    fit(run, draw)


# The command line ---------------------------------------------------------------------------------
def command_line(**settings):
    """The parser of both stages, with the defaults in its help. settings: other defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=sample.Help)
    add = parser.add_subparsers(dest="stage", required=True).add_parser
    ae = add("autoencoder", help="stage 1: rate + lambda * MSE", formatter_class=sample.Help)
    diffusion = add("diffusion", help="stage 2: x given x_hat", formatter_class=sample.Help)
    ae.add_argument("--prior", choices=entropy.PRIORS, default="context", help="Part I or II of "
                    "entropy.py; if --init has the other, only the prior is learned")
    diffusion.add_argument("--kind", choices=hfd.DENOISERS, help="plain v-prediction, with the "
                           "closed-form start, or with HFD+ too; left out: --init's, or plus")
    diffusion.add_argument("--eta", type=float, help="shift of the noise schedule: 1 is cosine, "
                           "the paper has 0.5; left out: --init's, or 0.1")
    diffusion.add_argument("--objective", choices=hfd.SCHEDULES, help="v: diffusion, flow: "
                           "rectified flow; left out: --init's, or v")
    for p, batch, crop in ((ae, 8, 128), (diffusion, 16, 64)):
        for flag, kind, default, text in (
                ("images", str, None, "folder of pictures, or one picture. Without: dead leaves"),
                ("out", str, "runs/model", "folder of the model"),
                ("init", str, None, "folder of a model to start from"),
                ("seed", sample.seed_number, 0, "of everything random"),
                ("device", str, "auto", "cuda, mps, cpu or auto"),
                ("steps", int, 20_000, "optimizer steps; the learning rate falls to zero there"),
                ("batch", int, batch, "crops per step (and per GPU); a quarter as many at the end"),
                ("crop", int, crop, "their side, a multiple of 16; twice that in the last quarter"),
                ("lr", float, 1e-3, "peak learning rate; in stage 2 Muon has ten times that"),
                ("warmup", int, 200, "steps until the peak is reached"),
                ("megapixels", float, 4000.0, "most picture data in memory (3 bytes a pixel)"),
                ("variety", float, 0.25, "chance of each: resized, softened in colour, relit"),
                ("log-every", int, 50, "steps a line"), ("save-every", int, 1000, "steps a save")):
            p.add_argument("--" + flag, type=kind, default=default, help=text)
        p.add_argument("--resume", action="store_true", help="go on in --out, flags as they were")
        p.set_defaults(**settings)
    return parser


def parsed(argv):
    """The flags in argv (with --resume a run's own are the defaults), and `part` and `state`, paths
    of what ships and of what --resume needs, and the `recipe`. HFDError for flags without sense."""
    args = command_line().parse_args(argv)
    part = Path(args.out, "autoencoder.npz" if args.stage == "autoencoder" else "denoiser.npz")
    state = part.with_suffix(".training.npz")
    recipe = {"commands": [], "settings": {}, "steps": 0, "gigapixels": 0.0, "minutes": 0.0}
    if args.resume:
        about, _ = hfd.read_archive(state)
        try:
            recipe = {name: type(new)(about["recipe"][name]) for name, new in recipe.items()}
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise HFDError(f"{state}: does not say what to resume ({error})") from None
        args = command_line(**recipe["settings"]).parse_args(argv)
    elif part.exists():
        raise HFDError(f"{part}: exists already; --resume continues it, another --out starts anew")
    for flag, value in vars(args).items():
        if type(value) in (int, float) and flag not in ("seed", "variety") and not 0 < value < 1e9:
            raise HFDError(f"--{flag.replace('_', '-')} must be above 0, and below 10^9")
    if args.crop % hfd.CELL or not 0 <= args.variety <= 1:
        raise HFDError("--crop must be a multiple of 16, --variety lie in [0, 1]")
    recipe["settings"] = {flag: value for flag, value in vars(args).items()
                          if flag not in ("stage", "out", "resume")}
    recipe["commands"].append("python train.py " + shlex.join(argv))
    args.part, args.state, args.recipe = part, state, recipe
    return args


def main(argv=None):
    """Run one command. argv: a list of words, or None for the shell's."""
    args = parsed(sys.argv[1:] if argv is None else argv)
    os.makedirs(args.out, exist_ok=True)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        if "WORLD_SIZE" in os.environ:                      # torchrun: a process per GPU
            if args.device in ("auto", "cuda") and torch.cuda.is_available():
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        device = sample.pick_device(args.device)
        known = hfd.load_model(args.init, device) if args.init else None
        torch.manual_seed(args.seed)
        (train_autoencoder if args.stage == "autoencoder" else train_diffusion)(args, device, known)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sample.run(main)
