"""Which tokens of which documents each rank holds, and where states flow."""

from lasp.sequence.layout import Fragment, Order, RealTokens, Run, RunLink, SequenceLayout
from lasp.sequence.planner import CostModel, LayoutCost, layout_costs, plan_layout

__all__ = [
    "CostModel",
    "Fragment",
    "LayoutCost",
    "Order",
    "RealTokens",
    "Run",
    "RunLink",
    "SequenceLayout",
    "layout_costs",
    "plan_layout",
]
