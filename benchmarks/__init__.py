"""Benchmark suites: each names the module whose ``run(quick)`` returns a Result."""

SUITES = {
    "decode": "regraft.benchmarks.decode",
    "attention": "regraft.benchmarks.attention",
    "capture": "regraft.benchmarks.capture",
    "cuda": "regraft.benchmarks.cuda",
    "perplexity": "regraft.benchmarks.perplexity",
    "weights": "regraft.benchmarks.weights",
    "linear": "regraft.benchmarks.linear",
    "linear-cuda": "regraft.benchmarks.linear_cuda",
    "kv-quality": "regraft.benchmarks.kv_quality",
    "onnx-export": "regraft.benchmarks.onnx_export",
    "onnx-models": "regraft.benchmarks.onnx_models",
    "onnx-import": "regraft.benchmarks.onnx_import",
    "onnx-files": "regraft.benchmarks.onnx_files",
    "coexec": "regraft.benchmarks.coexec",
    "coexec-overlap": "regraft.benchmarks.coexec_overlap",
    "prune": "regraft.benchmarks.prune",
    "prune-topics": "regraft.benchmarks.prune_topics",
    "prune-latency": "regraft.benchmarks.prune_latency",
    "prune-lm": "regraft.benchmarks.prune_lm",
}
