"""Train: optimisers, averaged weights, exact resumption, a progress line.

All random numbers of step n come from a generator seeded by (seed, n). A run that was killed and
resumed therefore continues exactly as if it had never stopped. Its state holds weights, averages,
optimiser moments, the log and the number of the next step, but needs no generator.

Muon (Jordan et al. 2024) trains the matrices inside the layers. It replaces each update by nearly
the closest orthogonal matrix, so that all directions are learnt at the same pace. AdamW trains the
rest (tables, biases, input and output projections). On the toy, the losses of the teacher fall
clearly faster than with AdamW alone.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing import cli, files, processes

SEEDS = 4294  # number of seeds, see `generator`
STEPS = cli.whole(1, 10**6)  # the type of --steps
ABOUT_OUT = "weights to write; the loss curve is beside them, for weights/ in results/"


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.  The defaults are our choice for the toy teacher."""

    steps: int
    batch: int = 16  # clips
    seed: int = 0
    muon_lr: float = 0.02  # 0: AdamW trains the matrices as well
    adam_lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.98)  # of AdamW
    weight_decay: float = 0.01  # of Muon; AdamW has none
    warmup: int = 30  # steps
    decay: float = 0.5  # the last share of the run, over which the rates fall linearly to 0
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.995  # decay of the averaged weights; 0: no average

    def __post_init__(self):
        # A run without steps would write untrained weights as if they had been trained.
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed={self.seed}: expected 0 to {SEEDS - 1}")


def rate(step, recipe) -> float:
    """Return the fraction of the full learning rate: warm-up, constant, linear decay.

    >>> [round(rate(s, Recipe(steps=100, warmup=10)), 2) for s in (0, 9, 30, 75, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.02]
    """
    left = (recipe.steps - step) / max(1, recipe.decay * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup, left)


def generator(seed, step) -> torch.Generator:
    """Return the only source of random numbers of a step."""
    # Runs have at most a million steps, so each (seed, step) gives another number here.
    # Trap: a CPU generator uses only the lowest 32 bits of it. Seeds of 4294 and more would repeat
    # the random numbers of smaller ones; `Recipe` rejects them.
    return torch.Generator().manual_seed(seed * 10**6 + step)


def optimisers(model, recipe):
    """Return Muon for the matrices of the layers and AdamW for the rest, or AdamW for all."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = name.startswith("layers.") and name.endswith("weight")
        (matrices if is_matrix and recipe.muon_lr else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=recipe.betas, weight_decay=0.0)
    if not matrices:
        return [adam]
    return [Muon(matrices, recipe.muon_lr, recipe.weight_decay), adam]


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are nearly orthogonal matrices (Jordan et al. 2024)."""

    # torch.optim.Muon does the same in bfloat16. On CPUs that emulate bfloat16 it is ten times
    # slower than this class, which computes in the dtype of the weights.
    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                update = nearly_orthogonal(p.grad.lerp(mean, momentum))  # Nesterov momentum
                p.mul_(1 - lr * group["weight_decay"])
                # A tall matrix spreads the update over more outputs than inputs: scale it up.
                p.sub_(lr * max(1, len(p) / p.shape[1]) ** 0.5 * update)


def nearly_orthogonal(x, steps=5):
    """Set all singular values of a matrix (n, m) close to 1, without computing them.

    >>> s = torch.linalg.svdvals(nearly_orthogonal(torch.diag(torch.tensor([9.0, 3.0, 0.5]))))
    >>> bool((s > 0.6).all() and (s < 1.25).all())
    True
    """
    y = (x if x.shape[0] <= x.shape[1] else x.T) / (x.norm() + 1e-7)
    # Each step maps a singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5: small ones grow
    # threefold, and all end between 0.7 and 1.2.
    for _ in range(steps):
        gram = y @ y.T
        y = 3.4445 * y + (-4.775 * gram + 2.0315 * gram @ gram) @ y
    return y if x.shape[0] <= x.shape[1] else y.T


class Averaged:
    """Exponential moving average of a model's weights: these are evaluated and written."""

    def __init__(self, model, decay):
        self.decay, weights = decay, model.state_dict() if decay else {}
        self.tensors = {n: p.detach().clone() for n, p in weights.items()}

    @torch.no_grad()
    def update(self, model, step):
        # At first the average is mostly the initial weights: let it follow faster.
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.state_dict().items() if self.decay else ():
            self.tensors[name].lerp_(p, 1 - decay)


def _part(tensors, prefix) -> dict:
    """Return the tensors whose names start with `prefix`, under the rest of their names."""
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


class Learner:
    """A model in training, with its optimisers and its average."""

    def __init__(self, model, recipe):
        self.model, self.recipe = model, recipe
        self.optimisers = optimisers(model, recipe)
        self.average = Averaged(model, recipe.ema)

    def update(self, loss, step) -> float:
        """Take one optimiser step; return the norm of the gradient before clipping."""
        value = processes.averaged(loss.detach())  # so that all processes stop together
        if not torch.isfinite(value):
            advice = "try another seed, or a recipe with a lower learning rate"
            raise ValueError(f"step {step}: the loss is {value.item()}; {advice}")
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = processes.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        # Trap: clipping by a norm of NaN makes every gradient NaN, so check the norm first.
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
        return next((n for n, g in named if not torch.isfinite(processes.whole(g)).all()), "?")

    def tensors(self) -> dict:
        """Return everything needed to continue, by name."""
        parts = {f"model.{n}": p for n, p in self.model.state_dict().items()}
        parts |= {f"average.{n}": p for n, p in self.average.tensors.items()}
        for i, optimiser in enumerate(self.optimisers):
            for j, state in optimiser.state_dict()["state"].items():
                parts |= {f"optimiser.{i}.{j}.{n}": t for n, t in state.items()}
        return parts

    def places(self, shapes) -> dict:
        """Return tensors to read a sharded state into; shapes: {name: shape} of the state."""
        parts = self.tensors()
        # A new optimiser has no moments yet. They have the shape, and the shards, of a parameter;
        # counters of steps do not.
        for name, shape in shapes.items():
            if name.startswith("optimiser."):
                _, i, j, _ = name.split(".")
                groups = self.optimisers[int(i)].param_groups
                p = [p for group in groups for p in group["params"]][int(j)]
                parts[name] = torch.zeros_like(p) if p.shape == shape else torch.zeros(shape)
        return parts

    def load(self, tensors, path):
        """Load the tensors of a state; path: the file to name in errors."""
        files.load_into(self.model, _part(tensors, "model."), path)
        self.average.tensors = _part(tensors, "average.")
        for i, optimiser in enumerate(self.optimisers):
            state = {}
            for name, t in _part(tensors, f"optimiser.{i}.").items():
                j, name = name.split(".", 1)
                state.setdefault(int(j), {})[name] = t
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


def state_of(folder) -> Path:
    return Path(folder) / "state.safetensors"


def curve_of(out) -> Path:
    """Return the file of the loss curve of a training that writes its weights to `out`.

    >>> str(curve_of("weights/x.safetensors")), str(curve_of("runs/x.safetensors"))
    ('results/x_curve.json', 'runs/x_curve.json')
    """
    folder = Path(out).parent
    if folder.name == "weights":  # released weights have their curve among the results
        folder = folder.parent / "results"
    return folder / f"{Path(out).stem}_curve.json"


def check_places(folder, out):
    """Raise ValueError if a training cannot write its state, weights or curve."""
    for path in (state_of(folder), out, curve_of(out)):
        files.check_writable(path, makes_folders=True)


def hashes(**weights_ids) -> dict:
    """Name hashes of weights for `Run`: files may move, but must hold the same weights.

    >>> hashes(teacher="1b2c")
    {"hash of the teacher's weights": '1b2c'}
    """
    return {f"hash of the {name}'s weights": x for name, x in weights_ids.items()}


def differences(was, now) -> str:
    """Name the settings that differ.

    >>> differences({"--seed": 1, "--batch": 8}, {"--seed": 1, "--batch": 4})
    '--batch was 8, now 4'
    """
    names = [n for n in {**was, **now} if was.get(n) != now.get(n)]
    return ", ".join(f"{n} was {was.get(n)}, now {now.get(n)}" for n in names)


class Run:
    """A training: learners, log and next step.  It saves its state and resumes from it."""

    def __init__(self, learners, command, folder=None, settings=None):
        """learners   by name; the first is the student, and its recipe says how many steps to run
        command    command line of this run, to be written with the weights
        folder     folder of the state; None: nothing is saved
        settings   all other options that change the results; a state with other settings or
                   recipes is not resumed
        """
        self.learners, self.command, self.settings = learners, command, settings or {}
        self.student = next(iter(learners.values()))
        self.steps = self.student.recipe.steps
        self.step, self.seconds, self.log, self._recent = 0, 0.0, [], []
        self.file = state_of(folder) if folder else None
        if self.file and processes.is_sharded():
            self._load_shards()
        elif self.file and list(self.file.parent.glob("state-[0-9]*")):
            raise ValueError(f"{self.file.parent}: holds the state of a run under torchrun")
        elif self.file and self.file.exists():
            self._load()

    def _all_settings(self):
        """Return settings and recipes, flat; those of a saved state must be the same."""
        found = dict(self.settings)
        for name, learner in self.learners.items():
            for field, value in asdict(learner.recipe).items():
                is_option = field in ("steps", "batch", "seed")
                found[f"--{field}" if is_option else f"{name}'s {field}"] = value
        return json.loads(json.dumps(found))  # tuples become lists, as in a state that was read

    def save(self):
        if not self.file:
            return
        about = {"step": self.step, "seconds": self.seconds, "log": self.log}
        about["settings"] = self._all_settings()
        if processes.is_sharded():
            from full_size import sharding

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
            raise ValueError(f"{self.file}: not a whole state file ({error}); remove it") from None
        self._go_on(about, tensors, self.file)

    def _load_shards(self):
        from full_size import sharding

        if self.file.exists():
            raise ValueError(f"{self.file}: not from torchrun; resume without, or remove the file")
        if not (found := sharding.states(self.file.parent)):
            return
        state, about = found[-1], sharding.about(found[-1])
        self._check(about, state)  # before all shards are read
        tensors, shapes = {}, sharding.saved_shapes(state)
        for name, learner in self.learners.items():
            places = learner.places(_part(shapes, f"{name}."))
            tensors |= {f"{name}.{n}": t for n, t in places.items()}
        sharding.read(state, tensors)
        self._go_on(about, tensors, state)

    def _check(self, about, path):
        """Raise ValueError if a state cannot be continued, naming the settings that differ."""
        if "settings" not in about:
            raise ValueError(f"{path}: of an earlier version; remove it to start anew")
        was, now = about["settings"], self._all_settings()
        if about["step"] <= self.steps:  # more steps only make a run longer
            was = {**was, "--steps": self.steps}
        if wrong := differences(was, now):
            advice = "choose another --run, or remove it to start anew"
            raise ValueError(f"{path}: belongs to another training ({wrong}); {advice}")

    def _go_on(self, about, tensors, path):
        self._check(about, path)
        if (planned := about["settings"]["--steps"]) != self.steps:
            # The learning rates of the past steps followed the shorter schedule.
            print(f"step {about['step']} of {planned} so far; goes on to step {self.steps}")
        self.step, self.seconds, self.log = about["step"], about["seconds"], about["log"]
        for name, learner in self.learners.items():
            learner.load(_part(tensors, f"{name}."), path)

    def train(self, update, print_every=25, save_every=100):
        """Train to the end; update(step) updates all learners and returns scalars to log."""
        while self.step < self.steps:
            start = time.perf_counter()
            with processes.shared_draws():
                values = update(self.step)
            self.step += 1
            self.seconds += time.perf_counter() - start
            self._log(values, print_every)
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()

    def _log(self, values, print_every):
        row = {
            n: float(processes.averaged(x.detach())) if torch.is_tensor(x) else float(x)
            for n, x in values.items()
        }
        self._recent.append(row)
        if self.step % print_every and self.step != self.steps:
            return
        mean = {n: sum(r[n] for r in self._recent) / len(self._recent) for n in row}
        self._recent = []
        self.log.append({"step": self.step, **{n: round(x, 5) for n, x in mean.items()}})
        shown = " ".join(f"{n} {x:.2f}" for n, x in mean.items())
        left = self.seconds / self.step * (self.steps - self.step)
        print(f"{self.step:5}/{self.steps}  {shown}, {left / 60:.0f} min left", flush=True)

    def write_student(self, path, write=files.save_weights, dtype=torch.float16):
        """Write the averaged weights of the student, in half precision, and the loss curve."""
        half = processes.whole_on_first(self.student.average.tensors, dtype)
        if not processes.is_first():
            return
        write(path, half, self.student.model.cfg, self.made_by())
        curve = curve_of(path)
        files.write_json(curve, self.log)
        print(f"wrote {path} and {curve}")

    def made_by(self) -> dict:
        """Describe the training, for its weight file."""
        return {
            "command": self.command,
            "steps": self.step,
            "minutes": round(self.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            **({"processes": processes.count()} if processes.is_sharded() else {}),
            "torch": str(torch.__version__),
        }


def descent(learner, losses):
    """Make the update function of a training; losses(step) returns a dict with a key "loss"."""

    def update(step):
        values = losses(step)
        return {**values, "norm": learner.update(values["loss"], step)}

    return update
