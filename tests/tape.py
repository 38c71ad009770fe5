"""A list of operations in the place of a CUDA graph, so that recordings can be tried on a CPU.

What is recorded is computed once, to have its results, and what it has changed meanwhile is put
back: a CUDA graph computes nothing before it is replayed. Replaying repeats every operation, and
writes into the memory of the recorded results, which all that comes later reads.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        super().__init__()
        self.calls, self.own, self.before = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        for x in given if _changes(func) else ():
            if _memory(x) not in self.own:
                self.before.setdefault(id(x), (x, x.clone()))
        result = func(*args, **kwargs)
        memory = {_memory(x) for x in given}
        new = [x for x in tree_leaves(result) if torch.is_tensor(x) and _memory(x) not in memory]
        self.own |= {_memory(x) for x in new}
        if new or _changes(func):
            self.calls.append((func, args, kwargs, result))
        return result

    def finish(self):
        """Put back what was changed."""
        for x, content in self.before.values():
            x.copy_(content)

    def replay(self):
        """Compute all anew."""
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                if func.namespace == "c10d":
                    # Itself it would not be waited for.
                    assert "allreduce" in func._schema.name
                    for tensor in args[0]:
                        dist.all_reduce(tensor)
                    continue
                found = func(*args, **kwargs)
                if not _changes(func):
                    for own, value in zip(tree_leaves(result), tree_leaves(found), strict=True):
                        if torch.is_tensor(own):
                            own.copy_(value)

    def reset(self):
        """Forget all."""
        self.calls.clear()


def _memory(x):
    return x.untyped_storage().data_ptr()


def _changes(func):
    return func._schema.is_mutable or func.namespace == "c10d"


@contextlib.contextmanager
def _recording(tape, **_):
    with tape:
        yield
    tape.finish()


class _Stream:
    def wait_stream(self, _):
        """There is one."""


def stand_in(patch):
    """Let tapes stand for CUDA graphs; `patch(object, name, value)` replaces attributes."""
    patch(torch.cuda, "CUDAGraph", Tape)
    patch(torch.cuda, "graph", _recording)
    patch(torch.cuda, "graph_pool_handle", object)
    patch(torch.cuda, "Stream", _Stream)
    patch(torch.cuda, "current_stream", _Stream)
    patch(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    patch(torch.cuda, "empty_cache", lambda: None)
    patch(torch.cuda, "get_rng_state", lambda _=None: torch.get_rng_state())
    patch(torch.cuda, "set_rng_state", lambda state, _=None: torch.set_rng_state(state))
