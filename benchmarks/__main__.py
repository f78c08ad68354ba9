"""Runs every suite and prints what it found."""

from importlib import import_module

from regraft.benchmarks import SUITES

if __name__ == "__main__":
    for module in SUITES.values():
        print(import_module(module).run(quick=False).to_markdown())
