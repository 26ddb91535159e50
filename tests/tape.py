"""Stand-ins for CUDA graphs and streams, on a CPU: they find what the real ones do not forgive."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree):
    return [t for t in tree_leaves(tree) if torch.is_tensor(t)]


def addresses(tree) -> set[int]:
    """Where the tensors of a tree are in memory; views are where their base is."""
    return {t.untyped_storage()._cdata for t in tensors(tree)}


def written(function, args, kwargs):
    """The tensors that an operator writes into, by its schema."""
    named = zip((a.name for a in function._schema.arguments), args)
    arguments = dict(named) | kwargs
    into = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
    return tensors([arguments.get(name) for name in into])


class Tape(TorchDispatchMode):
    """Every operator of a function, with its tensors: run again, it writes where it wrote before.

    Like a CUDA graph it knows addresses and no contents, and recording leaves no trace: memory that
    was written is put back, and memory that was allocated is spoilt, until it is replayed. Numbers
    that Python has read, slots that it has computed and tables that it has made elsewhere stay
    those of the recording.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.originals, self.made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for t in written(function, args, kwargs):
            storage = t.untyped_storage()
            if storage._cdata not in self.made:
                self.originals.setdefault(storage._cdata, (storage, storage.clone()))
        out = function(*args, **kwargs)
        given = addresses((args, kwargs))
        made = [t for t in tensors(out) if t.untyped_storage()._cdata not in given]
        self.made |= addresses(made)
        self.calls.append((function, args, kwargs, made))
        return out

    @classmethod
    def record(cls, function):
        """Return (replay, outputs), as `faster.cuda_recorder` records."""
        with cls() as tape:
            outputs = function()
        for storage, original in tape.originals.values():
            storage.copy_(original)
        for t in (t for *_, made in tape.calls for t in made):
            t.fill_(torch.nan if t.is_floating_point() else 0)
        return tape.replay, outputs

    def replay(self):
        for function, args, kwargs, made in self.calls:
            given = addresses((args, kwargs))
            again = tensors(function(*args, **kwargs))
            again = [t for t in again if t.untyped_storage()._cdata not in given]
            for old, new in zip(made, again, strict=True):
                old.copy_(new)


class TwoStreams(TorchDispatchMode):
    """A main and a side stream, each in order, but in no order to each other: finds missing waits.

    A stream knows up to where it has waited for the other. An operator may read only memory that it
    has waited for. Freed memory is used again by the stream that made it, so by its next operator
    the other stream must be done with it.
    """

    def __init__(self):
        super().__init__()
        self.stream, self.clock = "main", {"main": 0, "side": 0}
        self.waited = {"main": 0, "side": 0}  # up to which operator of the other one
        self.owner, self.wrote, self.read, self.faults = {}, {}, {}, []  # by storage
        self.freed = {"main": [], "side": []}  # for the owner to reuse: by whom it was read, when

    def begin_side(self):
        self.stream, self.waited["side"] = "side", self.start

    def join(self):
        self.waited["main"] = self.clock["side"]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.clock[self.stream] += 1
        self._check_reuse()
        given = addresses((args, kwargs))
        into = addresses(written(function, args, kwargs or {}))
        read = set() if function.is_view else given  # a view reads nothing
        for key in read & self.owner.keys():  # others are older than all this: weights, inputs
            self._touch(function, key, key in into)
        for storage in (t.untyped_storage() for t in tensors(out)):
            if storage._cdata not in given | self.owner.keys():
                self._made(storage)
        return out

    def _made(self, storage):
        key, me = storage._cdata, self.stream
        self.owner[key], self.wrote[key] = me, (me, self.clock[me])
        self.read[key] = {me: self.clock[me]}
        weakref.finalize(storage, self._free, key)

    def _touch(self, function, key, is_written):
        me, (who, when) = self.stream, self.wrote[key]
        if who != me and when > self.waited[me]:
            self.faults.append(f"{function} on {me} reads what {who} may not have written yet")
        if is_written:
            self.wrote[key] = me, self.clock[me]
        self.read[key][me] = self.clock[me]

    def _free(self, key):
        del self.wrote[key]
        self.freed[self.owner.pop(key)].append(self.read.pop(key))

    def _check_reuse(self):
        me, other = self.stream, {"main": "side", "side": "main"}[self.stream]
        if any(read.get(other, 0) > self.waited[me] for read in self.freed[me]):
            self.faults.append(f"memory of {me} is used again while {other} may still read it")
        self.freed[me].clear()


class Side:
    """`faster.SideStream` for TwoStreams."""

    def __init__(self, streams):
        self.streams, self.kept = streams, []

    def fork(self, step, *args):
        self.streams.start = self.streams.clock["main"]
        return step(*args)

    def beside(self, step, *args):
        self.streams.begin_side()
        self.kept.append(args)
        try:
            return step(*args)
        finally:
            self.streams.stream = "main"

    def join(self, step, *args):
        self.streams.join()
        self.kept.clear()
        return step(*args)


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._schema.name] += 1
        return function(*args, **(kwargs or {}))
