"""Schedulers: which match a model, and how to replace them by their diffusers name."""

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers

from mhla_gen.errors import UserError

# These take the variance from the output; others would misread a config that says so.
_LEARNING = ("DDPMScheduler", "DDPMParallelScheduler")


def prediction_of(scheduler: Any) -> str:
    """What a scheduler expects: `flow_prediction`, or a `prediction_type` of diffusers."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return scheduler.config.get("prediction_type", "epsilon")


def learns_variance(scheduler: Any) -> bool:
    """Whether a scheduler takes its variance from the model."""
    return "learned" in str(_setting(scheduler, "variance_type"))


def makes_variance(transformer: Any) -> bool:
    """Whether a DiT predicts a variance: twice as many channels as it gets."""
    config = transformer.config
    return (config.out_channels or config.in_channels) == 2 * config.in_channels


def check_scheduler(scheduler: Any, prediction_type: str, learned_variance: bool) -> None:
    """Raise unless the scheduler works with what the model predicts.

    Args:
        scheduler: Of diffusers.
        prediction_type: What the model predicts.
        learned_variance: Whether the model makes a variance, too.

    Raises:
        ValueError: If the scheduler expects another prediction, or a variance that is not there.
    """
    name, known = type(scheduler).__name__, _options(type(scheduler))
    expected = prediction_of(scheduler)
    if prediction_type == "flow_prediction" and not name.startswith("FlowMatch"):
        if "use_flow_sigmas" not in known:
            raise UserError(
                f"{name} cannot take {prediction_type}; choose one that can, such as "
                "FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler or "
                "DPMSolverMultistepScheduler"
            )
        if expected != prediction_type or not scheduler.config.use_flow_sigmas:
            raise UserError(
                f'{name} needs prediction_type="flow_prediction" and use_flow_sigmas=True for '
                "this model"
            )
    elif expected != prediction_type:
        raise UserError(
            f"{name} works on {expected}, but the model predicts {prediction_type}; "
            "choose a scheduler or its options to match"
        )
    if learns_variance(scheduler) and not (learned_variance and name in _LEARNING):
        reason = "the model has none" if not learned_variance else f"{name} cannot use it"
        raise UserError(
            f"variance_type={_setting(scheduler, 'variance_type')} needs a learned variance, but "
            f"{reason}; choose variance_type={_default(type(scheduler), 'variance_type')}"
        )


def other_scheduler(
    scheduler: Any,
    name: str | None,
    options: Mapping[str, Any],
    *,
    prediction_type: str | None = None,
    learned_variance: bool = False,
) -> Any:
    """A scheduler for the same prediction as another one.

    Args:
        scheduler: The one to replace; settings that the new class has are taken from it.
        name: Class in diffusers; None keeps the class.
        options: Settings that replace those of the old one, such as `flow_shift`.
        prediction_type: What the model predicts; None takes that of `scheduler`.
        learned_variance: Whether the model makes a variance, too.

    Raises:
        ValueError: If diffusers has no such scheduler, an option is none of it, or it does not fit.
    """
    new_class = type(scheduler) if name is None else scheduler_class(name)
    name = new_class.__name__
    known = _options(new_class)
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}{_suggestion(option, known)}")
    prediction_type = prediction_type or prediction_of(scheduler)
    settings: dict[str, Any] = {}
    if prediction_type == "flow_prediction":
        # Schedulers that serve several predictions have to be told.
        told = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        settings = {key: value for key, value in told.items() if key in known}
    # The same number under two names: how far the noise levels are moved towards noise.
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift"))
    if shift is not None:
        settings |= {key: shift for key in ("flow_shift", "shift") if key in known}
    if "variance_type" in known and type(scheduler) is not new_class:
        learns = learned_variance and name in _LEARNING
        settings["variance_type"] = (
            "learned_range" if learns else _default(new_class, "variance_type")
        )
    try:
        new = new_class.from_config(scheduler.config, **{**settings, **options})
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} does not take {dict(options)}: {reason}") from error
    check_scheduler(new, prediction_type, learned_variance)
    return new


def scheduler_class(name: str) -> Any:
    """A scheduler class of diffusers by its name.

    Raises:
        ValueError: If there is none.
    """
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and hasattr(found, "set_timesteps")):
        known = [key for key in dir(diffusers) if key.endswith("Scheduler")]
        raise UserError(f"diffusers has no scheduler {name!r}{_suggestion(name, known)}")
    return found


def _setting(scheduler: Any, name: str) -> Any:
    # A config made from another scheduler's keeps settings that this class does not have.
    return scheduler.config.get(name) if name in _options(type(scheduler)) else None


def _default(scheduler: type, name: str) -> Any:
    return inspect.signature(scheduler).parameters[name].default


@cache
def _options(scheduler: type) -> frozenset[str]:
    return frozenset(inspect.signature(scheduler).parameters)


def _suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
