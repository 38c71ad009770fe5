"""torch.compile for a transformer: its repeated blocks, or all of it."""

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mhla_gen.errors import UserError
from mhla_gen.runtime.linear_gelu import join_gelu

# Forms of one block that torch compiles: for training and for sampling, and for every size of a
# data set, where it finds no form for several. Its own limit is 8, after which it raises.
_MOST_FORMS = 256
# Channels of a token that are normalised without reading them twice.
_MOST_CHANNELS = 2048
# Options of torch.compile without which gradients can be wrong, without an error. From 4,096 tokens
# on, one kernel may normalise tokens and add them up; if the sum is a part of a larger gradient,
# such as that of Wan's modulation, this part is never written (issue 193061 of pytorch, also in
# torch 2.14.1). As an option of what is compiled it holds in every thread: backward passes are
# compiled in another one.
SUMS_APART = {"triton.mix_order_reduction": False}


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes of the blocks that a transformer repeats.

    Those that diffusers has for it, or else the class that the largest list of modules is of.

    Raises:
        ValueError: If it has no list of blocks.
    """
    named = getattr(model, "_repeated_blocks", None)
    if named:
        return tuple(named)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    if not lists:
        raise UserError(f"{type(model).__name__} repeats no blocks")
    largest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return (type(largest[0]).__name__,)


def _read_norms_once() -> None:
    """Let torch.compile hold a token's channels in registers while it normalises them.

    By default it does so up to 1,024 channels, and only if no tokens share what it reads, as they
    do modulation; it reads other tokens twice. There is no setting of this for one model: it holds
    for the whole process, also for the threads in which backward passes are compiled.
    """
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    ordinary: Any = InductorChoices.should_use_persistent_reduction
    if hasattr(ordinary, "most_channels"):
        return

    def reads_rows(features: Any) -> bool:
        hint = features.get_reduction_hint()
        if hint != ReductionHint.DEFAULT:
            return hint == ReductionHint.INNER
        reads = [read for node in features.reduction_nodes() for read in node.read_writes.reads]
        return all(isinstance(x, MemoryDep) and x.stride1_for_last_dim(False) for x in reads)

    def chosen(features: Any, cooperative_reduction: bool) -> bool:
        sizes: Any = V.graph.sizevars
        short = sizes.statically_known_leq(features.reduction_numel, _MOST_CHANNELS)
        may_hold = config.triton.persistent_reductions and not cooperative_reduction
        if short and may_hold and reads_rows(features):
            return True
        return ordinary(features, cooperative_reduction)

    chosen.most_channels = _MOST_CHANNELS  # type: ignore[attr-defined]
    InductorChoices.should_use_persistent_reduction = staticmethod(chosen)


def _sum_embeddings_in_order() -> None:
    """Let torch.compile call torch's own backward pass of an embedding.

    What it generates instead adds up the gradients of samples with the same label in any order, so
    that a resumed run would not be bit for bit that of an uninterrupted one. This, too, has no
    setting for one model: it holds for the whole process.
    """
    from torch._inductor.decomposition import decompositions, fast_random_decomps

    decompositions.pop(torch.ops.aten.embedding_dense_backward.default, None)
    # The copy that is used, made when something was first compiled.
    fast_random_decomps.cache_clear()


def keep_shapes_of_sums() -> None:
    """Keep torch.compile from sums that lose their shape, where a model's graphs are cut.

    While a generated kernel normalises tokens, it may also add them up. Before torch 2.14, a sum
    over tokens that a graph returns then lacks its axes of length 1, and autograd refuses it as a
    gradient (issue 178080 of pytorch). Modulation that is computed before a cut and read after it,
    as in blocks whose attention sends messages, has such gradients. This holds for the process.
    """
    # Compared as versions, not as text.
    if torch.__version__ < "2.14":
        from torch._inductor import config

        config.triton.mix_order_reduction = False


def compile_model(model: nn.Module, how: str, any_size: bool = False) -> None:
    """Compile a model for training in place; its parameters keep their names.

    Each size of its inputs is compiled by itself. From the second size on, torch would rather
    generate code for any size, which adds in another order: a step would depend on what the process
    had compiled before, such as previews, and a resumed run would not be bit for bit that of an
    uninterrupted one. With MHLA the number of forms is the same, but for a layout of one block.

    Args:
        model: A transformer.
        how: none; regional, each of its blocks, which compile once for all; or whole.
        any_size: Whether to leave that to torch, for inputs of more sizes than can be compiled.
    """
    if how == "none":
        return
    # DistributedDataParallel has torch cut what it compiles where a bucket of gradients is full, so
    # that they travel while the rest is computed. Blocks are small enough: cut, they take longer to
    # compile and to compute.
    torch._dynamo.config.optimize_ddp = how == "whole"
    dynamic = None if any_size else False
    if how == "whole":
        join_gelu(model)
        _read_norms_once()
        _sum_embeddings_in_order()
        model.compile(dynamic=dynamic, options=dict(SUMS_APART), **_limit_forms())
    else:
        compile_blocks(model, dynamic)


def compile_blocks(model: nn.Module, dynamic: bool | None = None, repeatable: bool = False) -> None:
    """Compile the blocks of a transformer in place, each class once for all of its blocks.

    Any number of models may be compiled in one process, each for as many sizes as its data have.
    Without gradients, GELU is part of the matrix product before it.

    Args:
        model: A transformer.
        dynamic: As of `torch.compile`: whether code is for any size; None for any from the second
            size on.
        repeatable: Never to choose kernels by timing: another process might choose others. (torch's
            own setting for all that is compiled, also TORCHINDUCTOR_DETERMINISTIC, is lost when
            anything has been compiled.)

    Raises:
        ValueError: If it repeats none.
    """
    options = SUMS_APART | ({"deterministic": True} if repeatable else {})
    how: dict[str, Any] = {"fullgraph": True, "dynamic": dynamic, "options": options}
    how |= _limit_forms()
    join_gelu(model)
    _read_norms_once()
    _sum_embeddings_in_order()
    for name in repeated_blocks(model):
        blocks = [module for module in model.modules() if type(module).__name__ == name]
        own: dict[int, FunctionType | None] = {}
        for block in blocks:
            function = getattr(block.forward, "__func__", None)
            code = own.setdefault(id(function), _own_code(function))
            forward = block.forward if code is None else MethodType(code, block)
            # What FSDP2 hooks to a block then runs around the compiled code, not inside.
            block.forward = torch.compile(forward, **how)
        for block in blocks[:1]:
            block.register_forward_pre_hook(_dense)


def _limit_forms() -> dict[str, Any]:
    """Arguments of torch.compile that let it make a form for every size of a data set.

    Releases that take none are told for the whole process.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": _MOST_FORMS}
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _MOST_FORMS)
    return {}


def _own_code(function: Any) -> FunctionType | None:
    """A copy of a function, with a code object that no other model has.

    torch keeps what it compiled by code object, so that otherwise the limit would be for all models
    of a process together. None for anything else.
    """
    if not isinstance(function, FunctionType):
        return None
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _dense(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first block's tokens as those of the others lie: in patch order they are transposed.

    Otherwise all would be compiled a second time for the first.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args[:1]) + args[1:]
