"""All that is asked for of a run, built and checked once."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from bitwright.blocks.scaling import AwqOptions
from bitwright.errors import check_choice
from bitwright.formats import FORMATS
from bitwright.methods.method import CORRECTED_DAMPING, DAMPING, MethodOptions
from bitwright.methods.registry import METHODS
from bitwright.precision.options import PrecisionOptions
from bitwright.runs.limits import RunLimits
from bitwright.text.builtin import given_or_builtin
from bitwright.text.calibration import CalibrationOptions

Preset = Literal["fast", "default", "high", "best"]
PRESETS: tuple[Preset, ...] = ("fast", "default", "high", "best")
Options = TypeVar("Options")


@dataclass(frozen=True)
class QuantizationOptions:
    """A run of `bitwright.quantize`, but for the model and its place.

    Parameters
    ----------
    precision, method, awq, limits
        What is stored, how it is found, and what that may take.
    calibration, activations, statistics
        Where the inputs of layers are known from; at most one of them.
    imatrix
        An importance matrix for layers of which nothing else is known.
    propagates
        Whether layers see what the quantized ones before them compute.
    preset
        Its name, for the model card.
    allow_requantize
        Whether the model may be quantized already.
    """

    precision: PrecisionOptions
    method: MethodOptions
    awq: AwqOptions
    limits: RunLimits
    calibration: CalibrationOptions | None = None
    activations: str | os.PathLike[str] | None = None
    statistics: str | os.PathLike[str] | None = None
    propagates: bool = True
    preset: str = "default"
    allow_requantize: bool = False
    imatrix: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "QuantizationOptions":
        """Return the options that keyword arguments of `bitwright.quantize` ask for.

        Raises
        ------
        ValueError, TypeError
            If one is unknown, of an unknown name, or contradicts another.
        """
        _check_names(given)
        method_name, preset = given.get("method", "gptq"), given.get("preset", "default")
        propagate = given.get("propagate")
        for name, value, known in (
            ("method", method_name, tuple(METHODS)),
            ("format", given.get("format", "mlx"), tuple(FORMATS)),
            ("propagate", propagate or "quantized", ("quantized", "original")),
            ("preset", preset, PRESETS),
        ):
            check_choice(name, value, known)
        method = METHODS[method_name]
        statistics, refine, drift = (given.get(name) for name in ("statistics", "refine", "drift"))
        if statistics is not None:
            _check_statistics_alone(given)
        corrects = preset != "fast" and method.corrects
        follows = propagate != "original"
        if drift and not follows:
            raise ValueError("drift: with propagate original there is none to correct")
        corrected = corrects and follows and statistics is None if drift is None else bool(drift)
        damping = given.get("damping")
        if damping is None:
            damping = CORRECTED_DAMPING if corrected else DAMPING
        chosen = {
            "method": method,
            "damping": damping,
            "refine": corrects if refine is None else refine,
            "drift": corrected,
        }
        calibration = given.get("calibration")
        given_inputs = (calibration, given.get("activations"), statistics, given.get("imatrix"))
        if (method.needs_inputs or preset in ("high", "best") or refine or drift) and all(
            each is None for each in given_inputs
        ):
            calibration = given_or_builtin(None)
        options = cls(
            taken(PrecisionOptions, given),
            taken(MethodOptions, {**given, **chosen}),
            taken(AwqOptions, given),
            taken(RunLimits, given),
            None
            if calibration is None
            else taken(CalibrationOptions, {**given, "source": calibration}),
            given.get("activations"),
            statistics,
            follows,
            preset,
            given.get("allow_requantize", False),
            given.get("imatrix"),
        )
        options._check_inputs(bool(drift))
        return options

    @property
    def two_sided(self) -> bool:
        """Whether layers are refined in the metrics of their outputs, too."""
        return self.preset == "high"

    def identity(self) -> dict[str, object]:
        """Return what decides the result, but for the recipe."""
        samples = {} if self.calibration is None else dict(vars(self.calibration))
        samples.pop("source", None)
        precision = dict(vars(self.precision))
        del precision["recipe"]
        return {
            **precision,
            **self.method.identity(),
            **vars(self.awq),
            **samples,
            "propagates": self.propagates,
        }

    def _check_inputs(self, drift: bool) -> None:
        """Raise ValueError unless there are the inputs that a method asks for."""
        if self.preset in ("high", "best") and self.calibration is None:
            raise ValueError(f"calibration: preset {self.preset} needs text or token ids")
        if self.precision.target_size is not None and self.preset != "best":
            raise ValueError(
                "target_size: asks for a choice of precisions, which preset best makes, and bitwright "
                "dynamic"
            )
        if self.preset == "best" and self.precision.type is not None:
            raise ValueError(
                f"preset: best chooses the precision of every layer itself; take another beside the type "
                f"{self.precision.type}"
            )
        if self.preset == "high" and not self.method.refine:
            raise ValueError(
                f"preset: high refines what the method has found, which {self.method.method.name} "
                f"does not do by default; take another preset, or refine (--refine)"
            )
        method, is_given = self.method.method, self.calibration is not None
        unknown = not is_given and self.activations is None and self.statistics is None
        if unknown and self.imatrix is not None and (method.scales_first or method.uses_magnitudes):
            raise ValueError(
                f"imatrix: {method.name} asks for more than the mean squares of inputs; give it "
                f"calibration, too"
            )
        if self.activations is not None and is_given:
            raise ValueError("activations: take the place of calibration; pass one of the two")
        if self.activations is not None and method.scales_first:
            raise ValueError(
                f"activations: {method.name} runs the model, so it needs calibration instead"
            )
        is_rms = self.method.activation_method == "rms"
        if method.uses_magnitudes and self.activations is None and not is_rms:
            raise ValueError(
                "activation_method: mean and max need activations; calibration gives rms"
            )
        if drift and not is_given:
            raise ValueError("drift: needs calibration data, which the model is run on")


def keyword_defaults() -> dict[str, Any]:
    """Return the keyword arguments of `bitwright.quantize`, with their defaults."""
    found: dict[str, Any] = {"method": "gptq", "preset": "default", "allow_requantize": False}
    inputs = ("calibration", "activations", "statistics", "imatrix")
    none = (*inputs, "refine", "drift", "propagate", "damping")
    for kind in (PrecisionOptions, MethodOptions, AwqOptions, RunLimits, CalibrationOptions):
        for name, each in inspect.signature(kind).parameters.items():
            found.setdefault(name, each.default)
    found |= dict.fromkeys(none)
    return {name: value for name, value in found.items() if name not in ("source", "windows")}


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise TypeError for a name that no keyword argument has."""
    for name in given.keys() - {"model", "out"} - keyword_defaults().keys():
        raise TypeError(f"quantize: there is no keyword argument {name!r}")


def taken(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Return options of a kind, made of those of many keyword arguments that are its own."""
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in given.items() if name in known})


def _check_statistics_alone(given: Mapping[str, Any]) -> None:
    """Raise ValueError if what statistics stand for, or what they cannot do, is asked for beside them."""
    instead = [name for name in ("calibration", "activations") if given.get(name) is not None]
    if instead:
        raise ValueError(f"statistics: take the place of {instead[0]}; pass one of the two")
    chosen = [name for name in ("samples", "length", "seed") if given.get(name)]
    chosen += [] if given.get("bos", True) else ["bos"]
    if chosen:
        raise ValueError(
            f"{chosen[0]}: the tokens of statistics were chosen when they were collected"
        )
    reasons = {
        "preset": (
            given.get("preset") in ("high", "best"),
            f"{given.get('preset')} takes gradients of tokens",
        ),
        "drift": (bool(given.get("drift")), "there are only the original's layers in statistics"),
        "propagate": (
            given.get("propagate") == "quantized",
            "statistics are of the original's layers",
        ),
    }
    if METHODS[given.get("method", "gptq")].scales_first:
        for name, only in (("metric", "mse"), ("objective", "layer")):
            asked = given.get(name, only) != only
            reasons[name] = (asked, f"statistics are enough for {only} only")
    for name, (is_asked, reason) in reasons.items():
        if is_asked:
            raise ValueError(f"{name}: {reason}, so it needs calibration data instead")
