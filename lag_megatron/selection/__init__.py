"""Selection rules: which candidate wins, the evidence for it, and the regret of other choices."""

from lag_megatron.selection.curve import Curves, Evaluation, rung_batches, rung_value
from lag_megatron.selection.decision_record import ProbeCost, ProbeRecord, build_decision
from lag_megatron.selection.evidence import (
    paired_interval,
    pearson,
    regret,
    relative_regret,
    spearman,
    tied_candidates,
)
from lag_megatron.selection.ranking import lag_rule, least_disturbed, losses_at, rank
from lag_megatron.selection.replay import Replay, replay
from lag_megatron.selection.rules import Verdict, can_still_win, judge, planned_rungs
from lag_megatron.selection.transition import MARGIN, phase_transition, self_correlation

__all__ = [
    "MARGIN",
    "Curves",
    "Evaluation",
    "ProbeCost",
    "ProbeRecord",
    "Replay",
    "Verdict",
    "build_decision",
    "can_still_win",
    "judge",
    "lag_rule",
    "least_disturbed",
    "losses_at",
    "paired_interval",
    "pearson",
    "phase_transition",
    "planned_rungs",
    "rank",
    "regret",
    "relative_regret",
    "replay",
    "rung_batches",
    "rung_value",
    "self_correlation",
    "spearman",
    "tied_candidates",
]
