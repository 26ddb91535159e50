"""What every trainer needs once: optimisers, averaged weights, exact resumption, a progress line.

All randomness of step n is drawn from a generator seeded with (seed, n), so a run that was killed
and resumed goes on exactly as if it had never stopped. Its state is weights, averages, optimiser
moments, the log and the number of the next step; no generator has to be saved.

Muon (Jordan et al. 2024) trains the matrices inside the layers: it replaces a gradient by the
nearest orthogonal matrix, so that all its directions are learnt at the same pace. Everything else
(tables, biases, the first and the last projection) is AdamW's. On the toy the teacher's losses fall
clearly faster than with AdamW alone.

    python -m plumbing.trainer    stops a small training half-way, resumes it, and compares
"""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from full_size import sharding
from plumbing import files

SEEDS = 4294  # of a training, from 0 on; `generator` says why
ABOUT_OUT = "weights to write; curve in results/, or beside them outside the current folder"


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.  Defaults are the toy teacher's, our choice.

    Raises ValueError for no steps, no clips, or a seed that would draw another one's numbers.
    """

    steps: int
    batch: int = 16  # clips
    seed: int = 0
    muon_lr: float = 0.02  # 0: AdamW for the matrices as well
    adam_lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.98)  # of AdamW
    weight_decay: float = 0.01  # of Muon; AdamW has none
    warmup: int = 30  # steps
    decay: float = 0.5  # last share of the run, over which the rates fall linearly to 0
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.995  # decay of the averaged weights

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed={self.seed}: expected 0 to {SEEDS - 1}")


def rate(step, recipe) -> float:
    """Share of the full learning rate at a step: warm-up, constant, linear decay.

    >>> [round(rate(s, Recipe(steps=100, warmup=10)), 2) for s in (0, 9, 30, 75, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.02]
    """
    left = (recipe.steps - step) / max(1, recipe.decay * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup, left)


def generator(seed, step) -> torch.Generator:
    """The only source of randomness of a step.

    Each (seed, step) has a number of its own: runs have less than a million steps.

    # Trap: a CPU generator uses the lowest 32 bits of its number only. From SEEDS on, a seed would
    draw what a smaller one draws; `Recipe` refuses it.
    """
    return torch.Generator().manual_seed(seed * 10**6 + step)


def optimisers(model, recipe):
    """Muon for the matrices of the layers, AdamW for the rest; or AdamW for all."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = ".layers." in name and name.endswith("weight")
        (matrices if is_matrix and recipe.muon_lr else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=recipe.betas, weight_decay=0.0)
    if not matrices:
        return [adam]
    return [Muon(matrices, recipe.muon_lr, recipe.weight_decay), adam]


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is an orthogonal matrix (Jordan et al. 2024).

    torch.optim.Muon does the same in bfloat16, which is ten times as slow as float32 on processors
    that must emulate it; this one computes in the dtype of its weights.
    """

    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                update = nearly_orthogonal(p.grad.lerp(mean, momentum))  # Nesterov's look ahead
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * max(1, len(p) / p.shape[1]) ** 0.5 * update)


def nearly_orthogonal(x, steps=5):
    """(n, m) -> the same with all singular values near 1, without computing them.

    Each step maps every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5: small ones grow
    threefold, all end between 0.7 and 1.2.

    >>> s = torch.linalg.svdvals(nearly_orthogonal(torch.diag(torch.tensor([9.0, 3.0, 0.5]))))
    >>> bool((s > 0.6).all() and (s < 1.25).all())
    True
    """
    y = (x if x.shape[0] <= x.shape[1] else x.T) / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = y @ y.T
        y = 3.4445 * y + (-4.775 * gram + 2.0315 * gram @ gram) @ y
    return y if x.shape[0] <= x.shape[1] else y.T


class Averaged:
    """Exponential moving average of a model's weights: what is evaluated and shipped."""

    def __init__(self, model, decay):
        """decay 0: nothing is averaged, and nothing is kept."""
        self.decay, weights = decay, model.state_dict() if decay else {}
        self.tensors = {n: p.detach().clone() for n, p in weights.items()}

    @torch.no_grad()
    def update(self, model, step):
        # Early on the average would be mostly the initial weights: let it follow faster.
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.state_dict().items() if self.decay else ():
            self.tensors[name].lerp_(p, 1 - decay)


def _part(tensors, prefix) -> dict:
    """The tensors whose names begin with `prefix`, without it."""
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


class Learner:
    """One model that learns: its optimisers and its average."""

    def __init__(self, model, recipe):
        self.model, self.recipe = model, recipe
        self.optimisers = optimisers(model, recipe)
        self.average = Averaged(model, recipe.ema)

    def update(self, loss, step) -> float:
        """One step down the loss; returns the norm of the gradient before clipping.

        Raises ValueError, naming step and tensor, if loss or gradient is not finite.
        """
        value = sharding.averaged(loss.detach())
        if not torch.isfinite(value):
            raise ValueError(
                f"step {step}: the loss is {value.item()}; try another seed, or a recipe with a "
                f"lower learning rate"
            )
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = sharding.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        # Trap: clipping by a norm of NaN would spoil every gradient; look for the culprit before.
        if not torch.isfinite(norm):
            raise ValueError(f"step {step}: gradient of {self._first_bad()} is not finite")
        torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip, norm)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group.setdefault("full_lr", group["lr"])
                group["lr"] = group["full_lr"] * rate(step, self.recipe)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update(self.model, step)
        return norm.item()

    def _first_bad(self):
        named = ((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)
        return next((n for n, g in named if not torch.isfinite(sharding.whole(g)).all()), "?")

    def tensors(self) -> dict:
        """Everything needed to go on, by name."""
        parts = {f"model.{n}": p for n, p in self.model.state_dict().items()}
        parts |= {f"average.{n}": p for n, p in self.average.tensors.items()}
        for i, optimiser in enumerate(self.optimisers):
            for j, state in optimiser.state_dict()["state"].items():
                parts |= {f"optimiser.{i}.{j}.{n}": t for n, t in state.items()}
        return parts

    def places(self, shapes) -> dict:
        """Tensors to read a sharded state into: our own, and moments cut as their parameters are.

        shapes   of everything in the state, by name
        """
        parts = self.tensors()
        for name, shape in shapes.items():
            if name.startswith("optimiser."):
                _, i, j, _ = name.split(".")
                groups = self.optimisers[int(i)].param_groups
                p = [p for group in groups for p in group["params"]][int(j)]
                parts[name] = torch.zeros_like(p) if p.shape == shape else torch.zeros(shape)
        return parts

    def load(self, tensors, path):
        """Inverse of `tensors`."""
        files.load_into(self.model, _part(tensors, "model."), path)
        self.average.tensors = _part(tensors, "average.")
        for i, optimiser in enumerate(self.optimisers):
            state = {}
            for name, t in _part(tensors, f"optimiser.{i}.").items():
                j, name = name.split(".", 1)
                state.setdefault(int(j), {})[name] = t
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


def state_of(folder) -> Path:
    """The file of a run's state."""
    return Path(folder) / "state.safetensors"


def curve_of(out) -> Path:
    """Where the curve goes of a training that writes its weights to `out`.

    >>> str(curve_of("weights/x.safetensors")), str(curve_of("../x.safetensors"))
    ('results/x_curve.json', '../x_curve.json')
    """
    is_here = Path(os.path.abspath(out)).is_relative_to(Path.cwd())
    return (Path("results") if is_here else Path(out).parent) / f"{Path(out).stem}_curve.json"


def check_places(folder, out):
    """Raises ValueError if a training cannot write its state, its weights or its curve."""
    for path in (state_of(folder), out, curve_of(out)):
        files.check_writable(path, makes_folders=True)


class Run:
    """One training: who learns, the log, the next step; saved as one file, resumed from it."""

    def __init__(self, learners, command, folder=None, marks=None):
        """learners   by name; the first is the one that is shipped, and its recipe the run's
        command    line that makes such a run; a state of another command is not resumed
        folder     for the state; None: nothing is saved
        marks      of the weights it begins with, by name of their files: others, another run

        Raises ValueError for a folder whose state is not whole, or not of this run.
        """
        self.learners, self.command, self.marks = learners, command, marks or {}
        self.shipped = next(iter(learners.values()))
        self.steps = self.shipped.recipe.steps
        self.step, self.seconds, self.log, self._recent = 0, 0.0, [], []
        self.file = state_of(folder) if folder else None
        if self.file and sharding.is_sharded():
            self._load_shards()
        elif self.file and sharding.states(self.file.parent):
            raise ValueError(f"{self.file.parent}: holds the state of a run under torchrun")
        elif self.file and self.file.exists():
            self._load()

    def _identity(self):
        """What a saved state must match; by way of JSON, which makes lists of tuples."""
        recipes = {name: asdict(learner.recipe) for name, learner in self.learners.items()}
        return json.loads(json.dumps({"command": self.command, "recipes": recipes}))

    def save(self):
        """Write everything needed to go on, beside the old state, then rename."""
        if not self.file:
            return
        about = {"step": self.step, "seconds": self.seconds, "log": self.log}
        about |= {"of": self._identity(), "marks": self.marks}
        if sharding.is_sharded():
            sharding.save(self.file.parent, self._tensors(), about)
            return
        tensors = {name: t.detach().clone() for name, t in self._tensors().items()}
        metadata = {"run": json.dumps(about)}
        files.write_beside(self.file, lambda p: save_file(tensors, p, metadata))

    def _tensors(self):
        named = ((n, learner.tensors().items()) for n, learner in self.learners.items())
        return {f"{name}.{n}": t for name, tensors in named for n, t in tensors}

    def _load(self):
        try:
            with safe_open(self.file, "pt") as f:
                about = dict(json.loads((f.metadata() or {})["run"]))
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.file}: not a whole state file ({error})") from None
        self._go_on(about, tensors, self.file)

    def _load_shards(self):
        if self.file.exists():
            raise ValueError(f"{self.file}: of a run without torchrun; go on without, or remove it")
        if not (found := sharding.states(self.file.parent)):
            return
        state, about = found[-1], sharding.about(found[-1])
        self._check(about, state)
        tensors, shapes = {}, sharding.saved_shapes(state)
        for name, learner in self.learners.items():
            places = learner.places(_part(shapes, f"{name}."))
            tensors |= {f"{name}.{n}": t for n, t in places.items()}
        sharding.read(state, tensors)
        self._go_on(about, tensors, state)

    def _check(self, about, path):
        if about.get("of") != self._identity():
            raise ValueError(f"{path}: belongs to another recipe; remove it to start anew")
        began = about.get("marks", self.marks)  # states of before there were marks have none
        for name, mark in self.marks.items():
            if began.get(name) != mark:
                raise ValueError(
                    f"{path}: began when {name} held other weights; remove it to start anew"
                )

    def _go_on(self, about, tensors, path):
        self._check(about, path)
        self.step, self.seconds, self.log = about["step"], about["seconds"], about["log"]
        for name, learner in self.learners.items():
            learner.load(_part(tensors, f"{name}."), path)

    def train(self, update, print_every=25, save_every=100):
        """Train to the end of the recipe.

        update(step) -> dict of named scalars to log, after everyone who learns has moved
        """
        while self.step < self.steps:
            start = time.perf_counter()
            with sharding.shared_draws():
                values = update(self.step)
            self.step += 1
            self.seconds += time.perf_counter() - start
            self._log(values, print_every)
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()

    def _log(self, values, print_every):
        row = {
            n: float(sharding.averaged(x.detach())) if torch.is_tensor(x) else float(x)
            for n, x in values.items()
        }
        self._recent.append(row)
        if self.step % print_every and self.step != self.steps:
            return
        mean = {n: sum(r[n] for r in self._recent) / len(self._recent) for n in row}
        self._recent = []
        self.log.append({"step": self.step, **{n: round(x, 5) for n, x in mean.items()}})
        shown = " ".join(f"{n} {x:.2f}".replace(" 0.", " .") for n, x in mean.items())
        left = self.seconds / self.step * (self.steps - self.step)
        print(f"{self.step:5}/{self.steps}  {shown}, {left / 60:.0f} min left", flush=True)

    def ship(self, path, write=files.save_weights, dtype=torch.float16):
        """Write the averaged weights of the first learner, in half precision, and its curve.

        write   function of path, tensors, config and a dict that says how they were made
        """
        half = sharding.whole_on_first(self.shipped.average.tensors, dtype)
        if not sharding.is_first():
            return
        write(path, half, self.shipped.model.cfg, self.made_by())
        curve = curve_of(path)
        files.write_json(curve, self.log)
        print(f"wrote {path} and {curve}")

    def made_by(self) -> dict:
        """What a weight file says about its making."""
        return {
            "command": self.command,
            "steps": self.step,
            "minutes": round(self.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            **({"processes": sharding.count()} if sharding.is_sharded() else {}),
            "torch": str(torch.__version__),
        }


def descent(learner, losses):
    """The update of a training with one loss: losses(step) -> dict, whose "loss" is minimised."""

    def update(step):
        values = losses(step)
        return {**values, "norm": learner.update(values["loss"], step)}

    return update


def _fit_line(folder, stops) -> torch.Tensor:
    """Weights of a line fitted in 60 steps, by a new run after each stop."""
    for stop in stops:
        torch.manual_seed(0)
        learner = Learner(torch.nn.Linear(3, 1), Recipe(60, adam_lr=0.1))

        def losses(step):
            x = torch.randn(16, 3, generator=generator(0, step))
            return {"loss": (learner.model(x) - x.sum(1, keepdim=True)).square().mean()}

        run = Run({"line": learner}, "a demonstration", folder)
        run.steps = stop
        run.train(descent(learner, losses), print_every=15)
    return learner.model.weight


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = _fit_line(None, [60]), _fit_line(folder, [30, 60])
    assert torch.equal(whole, resumed)
    print(f"stopped at 30 and resumed, or in one go: equal to the last bit, {whole.tolist()[0]}")
