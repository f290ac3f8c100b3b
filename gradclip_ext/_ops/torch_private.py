"""Every private or version-dependent name of torch that this package relies on, in one place.

Each was checked against torch 2.6 and 2.13, those of scalers and optimizers against 2.14 as well. A
future torch that moves one of them breaks this file, visibly, and nothing else.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.optim.optimizer as optimizer_module
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils.clip_grad import _get_total_norm
from torch.utils._device import DeviceContext
from torch.utils._foreach_utils import _device_has_foreach_support, _has_foreach_support
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "DeviceContext",
    "UnscaleGrads",
    "called_while_tracing",
    "declares_to_read_flags",
    "device_has_foreach_support",
    "disable_compiler",
    "dispatches_itself",
    "foreach_add_",
    "foreach_clamp_",
    "foreach_mul_",
    "found_inf_flags",
    "get_total_norm",
    "has_foreach_support",
    "has_step_pre_hooks",
    "has_torch_step",
    "is_exporting",
    "is_implemented",
    "is_in_transform",
    "is_wrapped",
    "is_zero_tensor",
    "looks_at_flags_itself",
    "negated",
    "parts",
    "reads_flags",
    "refuse_float16",
    "replaces_step",
    "replaces_unscaling",
    "require_names",
    "stored_values",
    "unobserved",
    "unscale_with",
    "unscaling_undone_on_error",
]

# What torch's own function calls. The function itself calls ours after gradclip_ext.patch(), which
# leads back to here.
get_total_norm: Callable[..., Tensor] = inspect.unwrap(_get_total_norm)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def device_has_foreach_support(device: torch.device) -> bool:
    """Whether ``foreach=True`` is allowed for tensors on this device."""
    return bool(_device_has_foreach_support(device))


def has_foreach_support(tensors: list[torch.Tensor], device: torch.device) -> bool:
    """Whether ``foreach=None`` chooses the multi-tensor operations for these tensors."""
    return bool(_has_foreach_support(tensors, device))


def foreach_add_(tensors: list[torch.Tensor], others: list[torch.Tensor], factor: float) -> None:
    """Add to every tensor, in place, the one at the same index in ``others`` times a number."""
    torch._foreach_add_(tensors, others, alpha=factor)


def foreach_mul_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply every tensor in place by one 0-dim tensor on the same device."""
    torch._foreach_mul_(tensors, factor)


def foreach_clamp_(tensors: list[torch.Tensor], clip_value: float) -> None:
    """Clamp every element of every tensor to ``[-clip_value, clip_value]`` in place."""
    torch._foreach_clamp_min_(tensors, -clip_value)
    torch._foreach_clamp_max_(tensors, clip_value)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether functorch holds another tensor in this one, as vmap and grad do."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def called_while_tracing(function: _Function) -> _Function:
    """Have a compiler call a function while it traces, and take the result for a constant.

    As ``torch.compiler.assume_constant_result`` does, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# A graph is guarded by the transforms that were active.
@called_while_tracing
def is_in_transform() -> bool:
    """Whether a functorch transform such as vmap or grad is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_exporting() -> bool:
    """Whether it is torch.export that traces; torch 2.6 tells only if that is without Dynamo."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return not torch.compiler.is_dynamo_compiling()


def is_implemented(operator: Any, device_type: str) -> bool:
    """Whether an operator of the dispatcher has an implementation for a type of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


def disable_compiler(function: _Function, reason: str) -> _Function:
    """``torch.compiler.disable``, which takes no reason in torch 2.6."""
    disable: Any = torch.compiler.disable
    if "reason" in inspect.signature(disable).parameters:
        return disable(function, reason=reason)  # type: ignore[no-any-return]
    return disable(function)  # type: ignore[no-any-return]


def is_zero_tensor(tensor: torch.Tensor) -> bool:
    """Whether the tensor is 0 throughout without having memory, as some derivatives are."""
    return bool(tensor._is_zerotensor())


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose elements are negated when they are read."""
    return torch._neg_view(tensor)


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a tensor consists of: values and indices of a sparse one, else itself."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.values(), tensor.crow_indices(), tensor.col_indices()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.values(), tensor.ccol_indices(), tensor.row_indices()]
    return [tensor]


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """No dispatch mode and no function mode sees what is done inside."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def dispatches_itself(tensor: torch.Tensor) -> bool:
    """Whether the tensor's class has operations of its own, as DTensor has."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def stored_values(sparse: torch.Tensor) -> torch.Tensor:
    """The values of a sparse COO tensor as they are stored, coalesced or not, sharing memory."""
    return sparse._values()


# What GradScaler.unscale_ hands the gradients of an optimizer to: optimizer, reciprocal of the
# scale, flag to set, whether float16 is allowed. It gives the flags by device.
_SCALER_MODULE = "torch.amp.grad_scaler"
_SUPPORTS_SCALING = "_step_supports_amp_scaling"
UnscaleGrads = Callable[[Any, Tensor, Tensor, bool], dict[torch.device, Tensor]]


def replaces_unscaling(scaler: GradScaler) -> bool:
    """Whether the class or the object has another way to unscale than torch's ``GradScaler``."""
    return _replaces(scaler, "unscale_") or _replaces(scaler, "_unscale_grads_")


def replaces_step(scaler: GradScaler) -> bool:
    """Whether it has another ``step``, which may not leave ``grad_scale`` as it is."""
    return _replaces(scaler, "step")


def _replaces(scaler: GradScaler, name: str) -> bool:
    if name in vars(scaler):
        return True
    # Not compared with GradScaler's, which may have been replaced itself.
    function = getattr(type(scaler), name)
    is_torchs = getattr(function, "__globals__", {}).get("__name__") == _SCALER_MODULE
    return not is_torchs or function.__qualname__ != f"GradScaler.{name}"


def unscale_with(
    scaler: GradScaler, optimizer: Any, unscale_grads: UnscaleGrads, rehearses: bool = False
) -> None:
    """Call ``scaler.unscale_(optimizer)`` with another pass over the gradients than torch's.

    One that ``rehearses`` raises what torch raises, and the scaler takes no note of it.
    """
    # In an object of its own that shares the scaler's records: another thread, or the user, would
    # take what is set on the scaler itself for the scaler's way to unscale.
    stand_in = object.__new__(type(scaler))
    vars(stand_in).update(vars(scaler), _unscale_grads_=unscale_grads)
    if rehearses:
        records = scaler._per_optimizer_states.copy()
        records.update({key: dict(state) for key, state in records.items()})
        stand_in._per_optimizer_states = records
    stand_in.unscale_(optimizer)


def found_inf_flags(scaler: GradScaler, optimizer: Any) -> list[Tensor]:
    """What the scaler has found in the gradients of an optimizer, one flag for each device."""
    return list(scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())


def refuse_float16(scaler: GradScaler, optimizer: Any, inverse: Tensor, found_inf: Tensor) -> None:
    """Raise what torch raises for a float16 gradient of the optimizer, before it writes any."""
    GradScaler._unscale_grads_(scaler, optimizer, inverse, found_inf, False)
    raise ValueError("Attempting to unscale FP16 gradients.")


def reads_flags(optimizer: Any) -> bool:
    """Whether ``GradScaler.step`` leaves it to the step to look for infinities."""
    return bool(getattr(optimizer, _SUPPORTS_SCALING, False))


def declares_to_read_flags(optimizer: Any) -> bool:
    """Whether its class says so, and not just what an object of it wraps."""
    return bool(getattr(type(optimizer), _SUPPORTS_SCALING, False))


@contextlib.contextmanager
def unscaling_undone_on_error(scaler: GradScaler, optimizers: Sequence[Any]) -> Iterator[None]:
    """After an exception the scaler knows of these optimizers what it knew before."""
    states = scaler._per_optimizer_states
    keys = [id(optimizer) for optimizer in optimizers]
    before = {key: dict(states[key]) for key in keys if key in states}
    try:
        yield
    except BaseException:
        for key in keys:
            states.pop(key, None)
        states.update(before)
        raise


@contextlib.contextmanager
def looks_at_flags_itself(optimizer: Any) -> Iterator[None]:
    """After an overflow ``GradScaler.step`` does not call the step of any optimizer.

    That of one that says it is fused would otherwise be called with the flag, to do nothing then.
    """
    name = _SUPPORTS_SCALING
    before = getattr(optimizer, name, False)
    if not before:
        yield
        return
    own = getattr(optimizer, "__dict__", {})
    is_own = name in own
    setattr(optimizer, name, False)
    try:
        yield
    finally:
        # A wrapper may have it from what it wraps, or pass on what is set.
        if is_own or name not in own:
            setattr(optimizer, name, before)
        else:
            delattr(optimizer, name)


def has_torch_step(optimizer: Any, classes: Sequence[type]) -> bool:
    """Whether ``optimizer.step`` is that of one of torch's classes.

    What torch puts around it is allowed, its profiler range and the counter of a learning rate
    scheduler. Anything else may change gradients or leave the step to another optimizer.
    """
    steps = [type(optimizer).step]
    replaced = getattr(optimizer, "__dict__", {}).get("step")
    if replaced is not None:
        if not _steps(replaced, optimizer):
            return False
        steps.append(replaced)
    own = [inspect.unwrap(cls.step) for cls in classes]  # type: ignore[attr-defined]
    for step in steps:
        step = getattr(step, "__func__", step)
        while True:
            if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim."):
                return False
            if not hasattr(step, "__wrapped__"):
                break
            step = step.__wrapped__
        if step not in own:
            return False
    return True


def _steps(function: Any, optimizer: Any) -> bool:
    """Whether a bound method, or what a scheduler makes of it, steps this optimizer and no other.

    An object may share the attributes of an optimizer, and so its ``step``.
    """
    if hasattr(function, "__self__"):
        return function.__self__ is optimizer
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    owners = [cell() for cell in cells if isinstance(cell, weakref.ref)]
    return owners == [optimizer]


def has_step_pre_hooks(optimizer: Any) -> bool:
    """Whether a hook is called before a step, one of the optimizer or one of all optimizers."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer_module._global_optimizer_pre_hooks)


def _set_by(cls: type) -> tuple[str, ...]:
    """The attributes that the constructor of a class uses."""
    names: tuple[str, ...] = inspect.unwrap(cls.__init__).__code__.co_names  # type: ignore[misc]
    return names


def require_names() -> None:
    """Raise, naming the version of torch, if it has moved what the functions above rely on."""
    # What an optimizer sets is read from its code: making one imports torch's compiler, which takes
    # longer than all of the rest.
    moved = [
        name
        for name, names in (
            ("GradScaler._unscale_grads_", dir(GradScaler)),
            ("GradScaler._per_optimizer_states", dir(GradScaler("cpu"))),
            ("Optimizer._optimizer_step_pre_hooks", _set_by(torch.optim.Optimizer)),
            ("optim.optimizer._global_optimizer_pre_hooks", dir(optimizer_module)),
            ("Optimizer._step_supports_amp_scaling", _set_by(torch.optim.SGD)),
        )
        if name.rpartition(".")[2] not in names
    ]
    if moved:
        raise ImportError(
            f"gradclip_ext: torch {torch.__version__} has no {' and no '.join(moved)}, on which "
            "clipping with a GradScaler or a fused optimizer relies; it is known to work with "
            "torch 2.6, 2.13 and 2.14"
        )


require_names()
