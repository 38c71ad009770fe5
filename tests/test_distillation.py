"""Distillation: each layer learns its softmax original, and nothing else moves."""

import copy

import pytest
import tiny
import torch

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.distillation import (
    LayerErrors,
    relative_error,
    relative_token_error,
    softmax_twin,
    train_only,
    trained_names,
)
from mhla_gen.models.surgery import swap_processor
from mhla_gen.training.optim import keep_mixing_in_range

# Grids that no layout divides: 4 × 4 tokens by 3, 5 × 6 by 2 × 4.
FAMILIES = {
    "dit": (tiny.tiny_dit, tiny.dit_inputs, (3, 3)),
    "pixart": (tiny.tiny_pixart, lambda: tiny.pixart_inputs(10, 12), (2, 4)),
    "hunyuan_dit": (tiny.tiny_hunyuan_dit, tiny.hunyuan_dit_inputs, (3, 3)),
    "wan": (tiny.tiny_wan, tiny.wan_inputs, (2, 2, 4)),
    "ltx": (tiny.tiny_ltx, tiny.ltx_inputs, (2, 2, 4)),
    "kandinsky5": (tiny.tiny_kandinsky5, tiny.kandinsky5_inputs, (2, 2, 4)),
    "sana_video": (tiny.tiny_sana_video, tiny.sana_video_inputs, (2, 2, 4)),
}
MAIN = ("dit", "wan")


def pair(family, trained="mhla", **settings):
    """A student and its teacher, ready for the layer stage, and inputs."""
    make, make_inputs, layout = FAMILIES[family]
    base = make()
    student = mhla_gen.inject(copy.deepcopy(base), MHLAConfig(layout=layout, **settings))
    names = trained_names(student, trained)
    teacher = softmax_twin(student, names)
    train_only(student, names)
    return base, without_dropout(student.train()), teacher, make_inputs()


def without_dropout(model):
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def output(model, inputs):
    return model(**inputs).sample


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_relative_error_is_a_share_of_each_sample():
    target = torch.randn(3, 5, 7)
    output = torch.stack([target[0], torch.zeros(5, 7), 3 * target[2]])
    torch.testing.assert_close(relative_error(output, target), torch.tensor([0.0, 1.0, 4.0]))


def test_a_small_token_counts_as_much_as_a_large_one():
    target = torch.randn(2, 5, 7) * torch.tensor([1, 1, 1, 1, 1e-3]).view(5, 1)
    wrong = target.clone()
    wrong[:, 4] = 0
    torch.testing.assert_close(relative_token_error(wrong, target), torch.full((2,), 0.2))
    assert relative_error(wrong, target).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_is_the_softmax_model_and_shares_its_weights(family):
    base, student, teacher, inputs = pair(family)
    assert torch.equal(output(teacher, inputs), output(base, inputs))
    own = dict(student.named_parameters())
    assert all(value is own[name] for name, value in teacher.named_parameters())
    assert teacher.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_in_training_shows_every_layer_the_softmax_models_activations(family):
    base, student, teacher, inputs = pair(family)
    expected = {}
    for name, layer in base.get_submodule("").named_modules():
        if name in dict(student.family.attentions(base)):
            layer.register_forward_hook(
                lambda _, args, kwargs, out, name=name: expected.update({name: (args, kwargs)}),
                with_kwargs=True,
            )
    seen = {}
    for name, layer in student.family.attentions(student):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update({name: (args, kwargs)}),
            with_kwargs=True,
        )
    softmax = output(base, inputs)
    layers = LayerErrors(student, teacher)
    found = layers.during(lambda: seen.update(out=output(student, inputs)))
    assert torch.equal(seen["out"], softmax)
    for name in layers.names:
        (args, kwargs), (own_args, own_kwargs) = expected[name], seen[name]
        hidden = args[0] if args else kwargs["hidden_states"]
        assert torch.equal(hidden, own_args[0] if own_args else own_kwargs["hidden_states"])
        assert found[name].shape == (len(softmax),) and found[name].min() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_zero_where_the_student_computes_softmax(family):
    _, student, teacher, inputs = pair(family)
    for _, layer in student.family.attentions(student):
        swap_processor(layer, student.family.unconverted_processor)
    found = LayerErrors(student, teacher).during(lambda: output(student, inputs))
    assert found and all(not error.any() for error in found.values())


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("trained", ["mhla", "attention"])
def test_gradients_of_a_layers_error_reach_that_layer_alone(family, trained):
    _, student, teacher, inputs = pair(family, trained, layers=[0, 2])
    layers = LayerErrors(student, teacher)
    assert [name.split(".")[1] for name in layers.names] == ["0", "2"]
    found = layers.during(lambda: output(student, inputs))
    name = layers.names[1]
    found[name].sum().backward()
    reached = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    own = f"{name}.mhla." if trained == "mhla" else f"{name}."
    assert reached and all(n.startswith(own) for n in reached)
    assert {f"{name}.mhla.mixing", f"{name}.mhla.gate.weight"} <= reached
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", MAIN)
def test_the_linear_half_learns_what_the_exact_half_leaves_out(family):
    rank = len(FAMILIES[family][2])
    tiles = {"exact_tile": (2,) * rank, "exact_window": (1,) * rank, "exact_top": 1}
    _, student, teacher, inputs = pair(
        family, exact=0.3, learned_features=True, conv=False, gate=False, **tiles
    )
    layers = LayerErrors(student, teacher, "token")
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    keep_mixing_in_range(optimizer, student)
    losses = []
    for _ in range(30):
        found = layers.during(lambda: output(student, inputs))
        losses.append(torch.stack(list(found.values())).mean(1))
        optimizer.zero_grad()
        losses[-1].sum().backward()
        optimizer.step()
    assert (losses[-1] < losses[0]).all()


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("trained", ["mhla", "attention"])
def test_layers_learn_and_the_teacher_stays(family, trained):
    base, student, teacher, inputs = pair(family, trained)
    original, softmax = state_of(teacher), output(base, inputs)
    layers = LayerErrors(student, teacher)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        found = layers.during(lambda: output(student, inputs))
        loss = torch.stack(list(found.values())).mean(1)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    assert (losses[-1] < 0.95 * losses[0]).all(), (losses[0], losses[-1])
    after = teacher.state_dict()
    assert all(torch.equal(original[name], after[name]) for name in original)
    assert torch.equal(output(teacher, inputs), softmax)
    assert torch.equal(output(mhla_gen.restore(student.eval()), inputs), softmax) is (
        trained == "mhla"
    )


def test_a_frozen_mixing_matrix_is_not_trained():
    _, student, _, _ = pair("dit", mixing_learnable=False)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained and not any("mixing" in name for name in trained)


def test_checkpointed_blocks_give_the_same_gradients():
    _, student, teacher, inputs = pair("dit", "attention")
    layers = LayerErrors(student, teacher)

    def gradients():
        student.zero_grad()
        found = layers.during(lambda: output(student, inputs))
        sum(error.sum() for error in found.values()).backward()
        assert layers._found is None
        return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    student.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_bfloat16_autocast_trains_the_layers():
    _, student, teacher, inputs = pair("wan", "attention")
    layers = LayerErrors(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = layers.during(lambda: output(student, inputs))
    total = torch.stack([error.sum() for error in found.values()]).sum()
    assert total.dtype == torch.float32
    total.backward()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_two_grids_train_in_one_step():
    _, student, teacher, _ = pair("wan")
    layers = LayerErrors(student, teacher)
    grids = [tiny.wan_inputs(3, 10, 12), tiny.wan_inputs(1, 6, 14)]
    found = [layers.during(lambda inputs=inputs: output(student, inputs)) for inputs in grids]
    sum(error.sum() for errors in found for error in errors.values()).backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_in_evaluation_mode_the_student_is_itself():
    base, student, teacher, inputs = pair("dit")
    plain = output(student.eval(), inputs)
    layers = LayerErrors(student, teacher)
    assert torch.equal(output(student, inputs), plain)
    assert not torch.equal(plain, output(base, inputs))
    with pytest.raises(RuntimeError, match="training mode"):
        layers.during(lambda: output(student, inputs))
    layers.remove()
    assert torch.equal(output(student.train(), inputs), plain)


def test_a_softmax_student_is_refused():
    _, _, teacher, _ = pair("dit")
    with pytest.raises(ValueError, match="no MHLA layers"):
        trained_names(teacher, "mhla")


@pytest.mark.gpu
@pytest.mark.parametrize("trained", ["mhla", "attention"])
def test_fused_kernels_and_bfloat16_give_the_same_errors_and_gradients(trained):
    def found(device, implementation, dtype):
        torch.manual_seed(0)
        base = tiny.tiny_dit(attention_head_dim=32, sample_size=16)
        config = MHLAConfig(layout=(3, 3), implementation=implementation)
        student = mhla_gen.inject(base, config).to(device)
        names = trained_names(student, trained)
        teacher = softmax_twin(student, names)
        train_only(student, names)
        layers = LayerErrors(without_dropout(student.train()), teacher)
        inputs = {name: value.to(device) for name, value in tiny.dit_inputs(16).items()}
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            errors = layers.during(lambda: output(student, inputs))
        torch.stack(list(errors.values())).sum().backward()
        gradients = {n: p.grad.cpu() for n, p in student.named_parameters() if n in names}
        return torch.stack(list(errors.values())).detach().cpu(), gradients

    exact, fused = found("cpu", "blockwise", None), found("cuda", "fused", torch.bfloat16)
    torch.testing.assert_close(fused[0], exact[0], rtol=0.05, atol=0)
    assert fused[1].keys() == exact[1].keys()
    for name, gradient in exact[1].items():
        error = (fused[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 0.1, name
