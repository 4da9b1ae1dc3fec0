"""The section about the algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apportion.conf.checks import LARGEST, MISSING, SMALLEST, above_zero, at_least, from_zero, one_of
from apportion.platform.errors import ConfigError


@dataclass
class KlConfig:
    """Distance to the reference: in the reward, in the loss, or nowhere. In the reward it is each token's, or the
    response's where the surrogate has one ratio for many tokens (docs/methods.md)."""

    place: str = "none"
    coefficient: float = 0.0
    estimator: str = "k3"
    # Of a KL in the loss: the estimator's value with k2's gradient, that of the reverse KL.
    straight_through: bool = False
    target: float | None = None  # with a horizon: the adaptive coefficient
    horizon: int = 10000

    def __post_init__(self) -> None:
        one_of("algorithm.kl.place", self.place, ("none", "reward", "loss"))
        one_of("algorithm.kl.estimator", self.estimator, ("k1", "k2", "k3", "abs"))
        from_zero("algorithm.kl.coefficient", self.coefficient, SMALLEST, 1e6)
        at_least("algorithm.kl.horizon", self.horizon, 1)
        if self.straight_through and self.place != "loss":
            raise ConfigError(
                f"algorithm.kl.straight_through: got true with place={self.place}, which has no gradient, expected place=loss"
            )
        above_zero("algorithm.kl.target", self.target, SMALLEST, LARGEST, ", or null for a fixed coefficient")
        if self.target is not None and self.place == "none":
            raise ConfigError("algorithm.kl.target: got a value with place=none, expected place=reward or place=loss")


@dataclass
class CorrectionConfig:
    """Importance weights w = trainer's probability / rollout engine's, which the policy's losses are multiplied by."""

    # truncate: w clamped to [floor, cap]. mask: w where it is within [floor, cap], else 0.
    method: str = "truncate"
    # w of each token; of the whole response; or, with mask, the geometric mean over the response decides and tokens keep theirs.
    level: str = "token"
    cap: float = 2.0
    # null: 1 / cap with mask, none with truncate. 0: no lower bound.
    floor: float | None = None
    normalize: bool = False  # divide by the mean weight of the optimizer step; costs the pass that makes old log-probs
    bound: float = 0.5  # |log-prob difference| past which a token counts in mismatch/share_beyond_bound

    def __post_init__(self) -> None:
        one_of("algorithm.correction.method", self.method, ("none", "truncate", "mask"))
        one_of("algorithm.correction.level", self.level, ("token", "sequence", "geometric"))
        at_least("algorithm.correction.cap", self.cap, 1.0, LARGEST)
        at_least("algorithm.correction.bound", self.bound, 0, LARGEST)
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise ConfigError(f"algorithm.correction.floor: got {self.floor}, expected 0 to 1, or null")
        if self.level == "geometric" and self.method != "mask":
            raise ConfigError(
                f"algorithm.correction.level: got geometric with method={self.method}, which has no response to mask, "
                "expected method=mask, or level=token or sequence"
            )
        for name, unset in (("floor", None), ("normalize", False)):
            if self.method == "none" and getattr(self, name) != unset:
                raise ConfigError(
                    f"algorithm.correction.{name}: got {getattr(self, name)} with method=none, which corrects nothing, "
                    "expected method=truncate or method=mask"
                )


@dataclass
class AlgorithmConfig:
    """algorithm = credit x surrogate x reduction (+ KL, selection, shaping). Components are mappings with a `name`
    (of the registry, or a dotted path of your own) and the parameters of that component. `distillation` takes the
    surrogate's place: the loss then comes from `teachers`, and credit is for the log alone."""

    name: str = MISSING
    credit: dict[str, Any] = MISSING
    surrogate: dict[str, Any] | None = MISSING  # null with a distillation
    distillation: dict[str, Any] | None = None
    reduction: dict[str, Any] = MISSING
    shaping: list[Any] = field(default_factory=list)
    selection: list[Any] = field(default_factory=list)
    kl: KlConfig = field(default_factory=KlConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    entropy_coefficient: float = 0.0
    updates_per_batch: int = 1  # optimiser steps that one batch is cut into
    epochs: int = 1  # passes over one batch

    def __post_init__(self) -> None:
        at_least("algorithm.updates_per_batch", self.updates_per_batch, 1)
        at_least("algorithm.epochs", self.epochs, 1)
        from_zero("algorithm.entropy_coefficient", self.entropy_coefficient, SMALLEST, 1e6)
        if self.surrogate is None and self.distillation is None:
            raise ConfigError(
                "algorithm.surrogate: got null, expected a mapping with a name, or algorithm.distillation"
            )
        if self.surrogate not in (None, MISSING) and self.distillation is not None:
            raise ConfigError("algorithm.surrogate: got one beside algorithm.distillation, expected null")
