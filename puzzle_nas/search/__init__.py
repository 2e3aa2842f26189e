"""The search on tables: no torch, tables from anywhere (Puzzle, section 3)."""

from puzzle_nas.search.baselines import greedy, homogeneous, max_params, no_op_only, random_architecture
from puzzle_nas.search.infeasible import InfeasibleLimitsError, LimitReport
from puzzle_nas.search.mip import FewerSolutionsError, solve
from puzzle_nas.search.problem import Limit, Problem, Solution, Table, read_table

__all__ = [
    "FewerSolutionsError",
    "InfeasibleLimitsError",
    "Limit",
    "LimitReport",
    "Problem",
    "Solution",
    "Table",
    "greedy",
    "homogeneous",
    "max_params",
    "no_op_only",
    "random_architecture",
    "read_table",
    "solve",
]
