"""Benchmark suites: each names the module whose ``run(quick)`` returns a Result."""

SUITES = {
    "decode": "regraft.benchmarks.decode",
    "capture": "regraft.benchmarks.capture",
    "perplexity": "regraft.benchmarks.perplexity",
}
