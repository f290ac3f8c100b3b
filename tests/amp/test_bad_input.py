"""What unscale_and_clip_grad_norm_ refuses, in torch's words where torch refuses it too."""

from __future__ import annotations

import pytest
import torch
import torch.optim.optimizer as optimizer_module
from scaling import (
    SCALE,
    copies,
    gradients,
    make_parameters,
    make_scaler,
    same,
    scale_gradients,
    stage,
)
from torch import nn

from gradclip_ext import clip_grad_norm_, unscale_and_clip_grad_norm_
from gradclip_ext._ops import torch_private


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def torchs_words(call):
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value), str(caught.value)


@pytest.fixture
def parameters():
    made = make_parameters()
    scale_gradients(made)
    return made


def test_float16_is_refused_in_torchs_words(parameters):
    parameters.append(nn.Parameter(torch.ones(3, dtype=torch.float16)))
    parameters[-1].grad = torch.ones(3, dtype=torch.float16)
    before, optimizer, scaler = gradients(parameters), sgd(parameters), make_scaler()
    kind, text = torchs_words(lambda: make_scaler().unscale_(optimizer))
    with pytest.raises(kind) as caught:
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
    assert str(caught.value) == text == "Attempting to unscale FP16 gradients."
    assert same(gradients(parameters), before)
    assert stage(scaler, optimizer) == "READY"
    assert "_unscale_grads_" not in vars(scaler)


def test_a_second_time_is_refused_in_torchs_words(parameters):
    optimizer, scaler = sgd(parameters), make_scaler()
    unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
    before = gradients(parameters)
    kind, text = torchs_words(lambda: scaler.unscale_(optimizer))
    assert text.startswith("unscale_() has already been called on this optimizer")
    with pytest.raises(kind) as caught:
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
    assert str(caught.value) == text
    assert same(gradients(parameters), before)
    assert stage(scaler, optimizer) == "UNSCALED"


def test_after_unscale_and_after_step(parameters):
    optimizer, scaler = sgd(parameters), make_scaler()
    scaler.unscale_(optimizer)
    before = gradients(parameters)
    with pytest.raises(RuntimeError, match=r"unscale_.. has already been called"):
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_.. is being called after step"):
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
    assert same(gradients(parameters), before)
    assert stage(scaler, optimizer) == "STEPPED"


def test_a_loss_that_was_not_scaled(parameters):
    scaler = torch.amp.GradScaler(torch.get_default_device().type)
    before = gradients(parameters)
    with pytest.raises(AssertionError, match="Attempted unscale_ but _scale is None"):
        unscale_and_clip_grad_norm_(scaler, sgd(parameters), 0.5)
    assert same(gradients(parameters), before)


def test_the_second_of_two_fails_and_the_first_is_as_before(parameters):
    optimizers, scaler = [sgd(parameters[:2]), sgd(parameters[2:])], make_scaler()
    scaler.unscale_(optimizers[1])
    before = gradients(parameters)
    with pytest.raises(RuntimeError, match="already been called"):
        unscale_and_clip_grad_norm_(scaler, optimizers, 0.5)
    assert [stage(scaler, o) for o in optimizers] == ["READY", "UNSCALED"]
    assert same(gradients(parameters), before)
    unscale_and_clip_grad_norm_(scaler, optimizers[0], 0.5)


def test_a_gradient_that_cannot_be_written(parameters):
    parameters[1].grad = torch.ones(()).expand(13)
    optimizer, scaler, before = sgd(parameters), make_scaler(), gradients(parameters)
    for part in (None, parameters[2:]):
        with pytest.raises(RuntimeError, match="single memory location"):
            unscale_and_clip_grad_norm_(scaler, optimizer, 0.5, parameters=part)
        assert same(gradients(parameters), before)
        assert stage(scaler, optimizer) == "READY"


def test_an_optimizer_without_gradients():
    parameters = [nn.Parameter(torch.ones(2))]
    optimizer, scaler = sgd(parameters), make_scaler()
    norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
    assert norm.item() == 0.0 and norm.dtype == torch.float32
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler.step(optimizer)


def test_a_disabled_scaler_leaves_clipping_alone(parameters):
    theirs = copies(parameters)
    scaler = torch.amp.GradScaler(enabled=False)
    for _ in range(2):
        norm = unscale_and_clip_grad_norm_(scaler, sgd(parameters), 0.5)
        assert norm.item() == clip_grad_norm_(theirs, 0.5).item()
        assert same(gradients(parameters), gradients(theirs))


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        (
            lambda p, s, o: (o, s, 1.0),
            TypeError,
            "unscale_and_clip_grad_norm_: scaler has to be a torch.amp.GradScaler, found a SGD; "
            "the scaler comes before the optimizer",
        ),
        (
            lambda p, s, o: (None, o, 1.0),
            TypeError,
            "unscale_and_clip_grad_norm_: scaler has to be a torch.amp.GradScaler, found None",
        ),
        (
            lambda p, s, o: (s, p, 1.0),
            TypeError,
            "unscale_and_clip_grad_norm_: optimizer[0] has to be a torch.optim.Optimizer, "
            "found a Parameter",
        ),
        (
            lambda p, s, o: (s, [], 1.0),
            ValueError,
            "unscale_and_clip_grad_norm_: optimizer has to be at least one optimizer, found none",
        ),
        (
            lambda p, s, o: (s, [o, o], 1.0),
            ValueError,
            "unscale_and_clip_grad_norm_: optimizer[0] and optimizer[1] are the same object, "
            "which would be stepped twice",
        ),
        (
            lambda p, s, o: (s, o, -1.0),
            ValueError,
            "unscale_and_clip_grad_norm_: max_norm has to be a number that is not negative, "
            "found -1.0",
        ),
        (
            lambda p, s, o: (s, o, 1.0, "two"),
            TypeError,
            "unscale_and_clip_grad_norm_: norm_type has to be a number, found 'two' (str)",
        ),
    ],
)
def test_arguments(parameters, arguments, kind, text):
    optimizer, scaler = sgd(parameters), make_scaler()
    before = gradients(parameters)
    with pytest.raises(kind) as caught:
        unscale_and_clip_grad_norm_(*arguments(parameters, scaler, optimizer))
    assert str(caught.value) == text
    assert same(gradients(parameters), before)
    assert stage(scaler, optimizer) == "READY"


@pytest.mark.parametrize(
    "owner, name",
    [
        (torch.amp.GradScaler, "_unscale_grads_"),
        (optimizer_module, "_global_optimizer_pre_hooks"),
    ],
)
def test_a_torch_without_the_private_names_is_named(owner, name, monkeypatch):
    torch_private.require_names()
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError) as caught:
        torch_private.require_names()
    assert f"gradclip_ext: torch {torch.__version__} has no " in str(caught.value)
    assert name in str(caught.value) and "2.6, 2.13 and 2.14" in str(caught.value)


@pytest.mark.parametrize(
    "owner, name",
    [
        (torch.optim.Optimizer, "_optimizer_step_pre_hooks"),
        (torch.optim.SGD, "_step_supports_amp_scaling"),
    ],
)
def test_a_torch_whose_optimizers_set_other_names_is_named(owner, name, monkeypatch):
    monkeypatch.setattr(owner, "__init__", lambda self: None)
    with pytest.raises(ImportError, match=name):
        torch_private.require_names()


def test_parameters_that_are_no_tensors(parameters):
    with pytest.raises(TypeError) as caught:
        unscale_and_clip_grad_norm_(make_scaler(), sgd(parameters), 1.0, parameters=[3])
    assert str(caught.value) == (
        "unscale_and_clip_grad_norm_: parameters[0] has to be a torch.Tensor, found 3 (int)"
    )


def test_clip_grad_of_a_group(parameters):
    optimizer = torch.optim.SGD([{"params": parameters, "clip_grad": "no"}], lr=0.1)
    with pytest.raises(TypeError) as caught:
        unscale_and_clip_grad_norm_(make_scaler(SCALE), optimizer, 1.0)
    assert str(caught.value) == (
        "unscale_and_clip_grad_norm_: optimizer.param_groups[0]['clip_grad'] has to be True or "
        "False, found 'no' (str)"
    )
