"""What processes check that share the sequences of a whole Wan model; see `ranks`."""

import copy

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel
from ranks import close
from tiny import disturb, tiny_wan, wan_inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.models.parallel import sum_gradients
from mhla_gen.ops import depthwise

# Wan computes norms and modulation in float32 whatever its weights are.
TOLERANCE = 1e-6


def model_under_ddp_equals_one_process(mhla, parallel):
    model_equals_one_process(mhla, parallel, ddp=True)


def compiled_model_equals_one_process(mhla, parallel):
    model_equals_one_process(mhla, parallel, compiled=True)


def compiled_model_with_kernels_equals_one_process(mhla, parallel):
    """With the convolution's kernels, which need float32."""
    depthwise._fused_can_run = lambda tokens: True
    model_equals_one_process(mhla, parallel, compiled=True, dtype=torch.float32, tolerance=2e-5)


def model_equals_one_process(
    mhla, parallel, ddp=False, compiled=False, dtype=torch.float64, tolerance=TOLERANCE
):
    torch.manual_seed(0)
    whole = disturb(mhla_gen.inject(tiny_wan(num_attention_heads=2), MHLAConfig(**mhla))).to(dtype)
    shared = copy.deepcopy(whole)
    if compiled:
        # What comes before code is generated, which takes most of the time.
        shared.compile_repeated_blocks(backend="aot_eager", dynamic=False)
    _share(shared, parallel)
    for model in (whole, shared):
        model.train().enable_gradient_checkpointing()
    inputs = _inputs(16 if "ulysses_degree" in parallel else 14, dtype)
    probe = torch.randn_like(inputs["hidden_states"])

    expected = whole(**inputs)[0]
    (expected * probe).sum().backward()
    runner = DistributedDataParallel(shared) if ddp else shared
    found = runner(**inputs)[0]
    # DDP takes the mean of the gradients where sharing a sequence needs the sum.
    ((found * probe).sum() * (dist.get_world_size() if ddp else 1)).backward()
    if not ddp:
        sum_gradients(shared)

    close(found, expected, tolerance, "output")
    largest = max(p.grad.abs().max() for p in whole.parameters())
    for (name, local), full in zip(shared.named_parameters(), whole.parameters(), strict=True):
        close(local.grad / largest, full.grad / largest, tolerance, f"gradient of {name}")
    with pytest.raises(ValueError, match="before enable_parallelism"):
        mhla_gen.restore(shared)


def gradients_of_compiled_blocks_are_those_of_eager_ones(width=128):
    """At a size at which torch.compile normalises tokens and adds them up in one kernel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 10, "attention_head_dim": 64, "num_layers": 1}
    model = disturb(mhla_gen.inject(tiny_wan(**sizes), MHLAConfig(layout=(2, 2, 3)))).to(device)
    inputs = wan_inputs(frames=4, height=128, width=width)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    _share(model, {"ring_degree": dist.get_world_size(), "ring_anything": True}, device)
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_repeated_blocks(dynamic=False)
        model(**inputs, return_dict=False)[0].square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    eager, compiled = found
    largest = max(gradient.abs().max() for gradient in eager)
    for (name, _), x, y in zip(model.named_parameters(), compiled, eager, strict=True):
        # Sums of 8,192 tokens in float32: half its digits.
        close(x / largest, y / largest, 3e-4, f"gradient of {name}")


def any_number_of_tokens_can_be_sampled(mhla, parallel):
    torch.manual_seed(0)
    whole = disturb(mhla_gen.inject(tiny_wan(), MHLAConfig(**mhla))).double()
    shared = _share(copy.deepcopy(whole), parallel | {"ulysses_anything": True})
    inputs = _inputs(width=14)
    # As Wan 2.2 TI2V has it, every token has a time of its own.
    inputs["timestep"] = torch.randint(0, 999, (2, 3 * 5 * 7)).double()
    with torch.no_grad():
        close(shared(**inputs)[0], whole(**inputs)[0], TOLERANCE, "output")


def _inputs(width, dtype=torch.float64):
    inputs = wan_inputs(frames=3, height=10, width=width, batch=2)
    # With sequences shared, diffusers takes tuples only.
    return {name: tensor.to(dtype) for name, tensor in inputs.items()} | {"return_dict": False}


def _gather(tensor, dim, group):
    # Stands in for NCCL's: gloo gathers pieces of one size only.
    pieces = [None] * dist.get_world_size(group)
    dist.all_gather_object(pieces, tensor.detach(), group)
    return torch.cat(pieces, dim)


def _share(model, parallel, device="cpu"):
    if device == "cpu":
        context_parallel._all_gather_anything = _gather
        # diffusers makes a mesh, and numbers devices, of GPUs where torch could use some.
        torch.accelerator.device_count = lambda: 1
    shape = parallel.get("ring_degree", 1), parallel.get("ulysses_degree", 1)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("ring", "ulysses"))
    model.enable_parallelism(config=ContextParallelConfig(**parallel, mesh=mesh))
    return model
