"""Selection: which candidate wins, on what evidence, and what another choice would have cost."""

from lag_megatron.selection.decision import ProbeCost, ProbeRecord, build_decision
from lag_megatron.selection.evidence import pearson, regret, relative_regret, spearman, ties
from lag_megatron.selection.ranking import RULES, lag_rule, losses_at, rank

__all__ = [
    "RULES",
    "ProbeCost",
    "ProbeRecord",
    "build_decision",
    "lag_rule",
    "losses_at",
    "pearson",
    "rank",
    "regret",
    "relative_regret",
    "spearman",
    "ties",
]
