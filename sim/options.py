"""What a search is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from sim.errors import require
from sim.hints import size_words
from sim.plan import Plan
from sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Options:
    """`partners` are the GPUs whose links may be used. None: all; published strategies then take DeepPlan's partner.

    `memory_budget_bytes` limits the bytes of weights held on the target; `runs` > 1 minimises the mean of one cold start
    and runs - 1 warm runs. Weights of at most `keep_bytes` stay on the target between starts, or, with `keep_ratio`, as few as
    make a start take no longer than so many times a warm run.
    """

    target: int = 0
    partners: tuple[int, ...] | None = None
    memory_budget_bytes: int | None = None
    runs: int = 1
    keep_bytes: int | None = None
    keep_ratio: float | None = None

    @property
    def keeps(self) -> bool:
        """Whether it was asked what to keep between starts."""
        return self.keep_bytes is not None or self.keep_ratio is not None

    def __post_init__(self) -> None:
        require(
            self.runs >= 1, f"--runs {self.runs}: at least the cold start itself must run; give 1 or more"
        )
        require(
            self.memory_budget_bytes is None or self.memory_budget_bytes >= 0,
            f"--memory-budget {self.memory_budget_bytes}: cannot be negative; 0 reads everything in place",
        )
        require(
            self.keep_bytes is None or self.keep_bytes >= 0,
            f"--keep {self.keep_bytes}: cannot be negative; 0 keeps nothing",
        )
        require(
            self.keep_ratio is None or self.keep_ratio >= 1,
            f"--keep {self.keep_ratio or 0:g}x: a start that is faster than a warm run is asked; give 1x or more, as 1.05x",
        )
        require(
            self.keep_ratio is None or self.runs == 1,
            f"--keep {self.keep_ratio or 0:g}x with --runs {self.runs}: the ratio is of one cold start; leave --runs out, or give "
            "the bytes to keep",
        )
        require(
            self.keep_bytes is None or self.keep_ratio is None,
            f"--keep {self.keep_bytes} and {self.keep_ratio or 0:g}x: both cannot be kept to; give one",
        )
        require(
            self.keep_bytes is None
            or self.memory_budget_bytes is None
            or self.keep_bytes <= self.memory_budget_bytes,
            f"--keep {size_words(self.keep_bytes or 0)}: more than the --memory-budget of "
            f"{size_words(self.memory_budget_bytes or 0)}, towards which it counts; give at most that",
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan with its prediction. `mean_ns` is the mean over Options.runs runs; the makespan where there is one run.

    `settles`: the mean counts on copying what is read in place after the first answer, before the next run.
    """

    name: str
    plan: Plan
    makespan_ns: float
    mean_ns: float
    settles: bool
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Outcome:
    """`strategies` are the published ones in order, those that fit the options, then the best. `gap` is best / bound - 1.

    Where weights are kept, `best` is the best that keeps them, called "kept", and the last but one the best that keeps none.
    `left_out` says which published strategies are missing, and why.
    """

    best: Candidate
    strategies: tuple[Candidate, ...]
    left_out: tuple[tuple[str, str], ...]
    bound_ns: float
    gap: float
    exact: bool
    evaluated: int
    seconds: float
    warm_ns: float
    """What a warm run takes at least."""
