"""The loss scaling that a checkpoint holds, in each of DeepSpeed's two forms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lag_megatron.checkpoint.storage import torch_pickle

# DeepSpeed's own defaults for fp16 (runtime/precision_config.py, fp16/loss_scaler.py).
_INITIAL_SCALE_POWER = 16
_SCALE_WINDOW = 1000
_HYSTERESIS = 2
_MIN_SCALE = 1


@dataclass(frozen=True, slots=True)
class LossScale:
    """The factor on the loss against fp16 underflow, and when it changes."""

    dynamic: bool = False
    scale: float = 1.0
    iteration: int = 0
    last_overflow: int = -1
    factor: float = 2.0
    window: int = _SCALE_WINDOW
    hysteresis: int = _HYSTERESIS
    hysteresis_left: int = _HYSTERESIS
    refill: bool = False
    min_scale: float = _MIN_SCALE

    @staticmethod
    def initial(config: Mapping[str, Any]) -> "LossScale":
        """The initial state under this ``fp16`` section of DeepSpeed's configuration."""
        static = float(config.get("loss_scale") or 0)
        if static:
            return LossScale(scale=static)
        return LossScale(
            dynamic=True,
            scale=2.0 ** config.get("initial_scale_power", _INITIAL_SCALE_POWER),
            window=config.get("loss_scale_window", _SCALE_WINDOW),
            hysteresis=config.get("hysteresis", _HYSTERESIS),
            hysteresis_left=config.get("hysteresis", _HYSTERESIS),
            refill=config.get("consecutive_hysteresis", False),
            min_scale=config.get("min_loss_scale", _MIN_SCALE),
        )

    @staticmethod
    def of_object(scaler: Any) -> "LossScale":
        """From the loss scaler object that ZeRO 1 to 3 pickle."""
        kept = vars(scaler)
        if not kept.get("dynamic"):
            return LossScale(scale=kept.get("cur_scale", 1.0))
        return LossScale(
            True,
            kept["cur_scale"],
            kept["cur_iter"],
            kept["last_overflow_iter"],
            kept["scale_factor"],
            kept["scale_window"],
            kept["delayed_shift"],
            kept["cur_hysteresis"],
            kept["consecutive_hysteresis"],
            kept["min_scale"],
        )

    @staticmethod
    def of_entries(kept: Mapping[str, Any]) -> "LossScale":
        """From the entries of the state of the 16-bit optimizer without ZeRO."""
        if not kept["dynamic_loss_scale"]:
            return LossScale(scale=kept["cur_scale"], iteration=kept["cur_iter"])
        return LossScale(
            True,
            kept["cur_scale"],
            kept["cur_iter"],
            kept["last_overflow_iter"],
            kept["scale_factor"],
            kept["scale_window"],
        )

    def as_object(self) -> Any:
        """The loss scaler object of ZeRO 1 to 3."""
        if not self.dynamic:
            scaler: Any = torch_pickle.LossScaler()
            vars(scaler).update(cur_scale=self.scale, dynamic=False)
            return scaler
        scaler = torch_pickle.DynamicLossScaler()
        vars(scaler).update(
            cur_scale=self.scale,
            dynamic=True,
            cur_iter=self.iteration,
            last_overflow_iter=self.last_overflow,
            scale_factor=self.factor,
            scale_window=self.window,
            min_scale=self.min_scale,
            delayed_shift=self.hysteresis,
            cur_hysteresis=self.hysteresis_left,
            consecutive_hysteresis=self.refill,
            raise_error_at_min_scale=True,
            dtype=torch.float16,
        )
        return scaler

    def as_entries(self) -> dict[str, Any]:
        """The entries of the 16-bit optimizer without ZeRO."""
        entries: dict[str, Any] = {
            "dynamic_loss_scale": self.dynamic,
            "cur_scale": self.scale,
            "cur_iter": self.iteration,
        }
        if self.dynamic:
            entries |= {
                "last_overflow_iter": self.last_overflow,
                "scale_factor": self.factor,
                "scale_window": self.window,
            }
        return entries
