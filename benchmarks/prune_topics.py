"""Accuracy of pruned classifiers of topics: as the suite ``prune``, on longer texts."""

from regraft.benchmarks.classifiers import TOPICS
from regraft.benchmarks.harness import Result
from regraft.benchmarks.prune import accuracies


def run(quick: bool = False) -> Result:
    """quick: one seed, 500 tests, two budgets, three stages."""
    return accuracies(TOPICS, "prune-topics", quick)
