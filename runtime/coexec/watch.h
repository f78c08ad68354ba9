// What is noted for reports: time, and on the trace graph where Python waited and paths part.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

#include "interceptor.h"

namespace regraft {

// Every engine is one of these.
struct Watched : Engine {
  int64_t entered = 0, inside_ns = 0;
  std::map<std::string, int64_t> waits;  // those noted on the graph so far

  static Watched& of(Engine& engine) { return static_cast<Watched&>(engine); }

  // No operator ran meanwhile, at least: those that ran aside while Python waited count twice.
  int64_t idle_ns() const { return std::max<int64_t>(0, inside_ns - stall_ns - tape.aside_ns); }

  void clear() {
    Engine::clear();
    inside_ns = 0, waits.clear();
  }
};

// Does `work` and notes whether Python waited in it.
template <typename F>
static void watch(F&& work) {
  auto* engine = Engine::active();
  const auto stalled = engine ? engine->stall_ns : 0;
  work();
  if (!engine) return;
  auto& here = engine->graph->here();
  if (here.parent && here.parent->children.size() > 1 && !(here.remark && here.remark->line.size()))
    here.remarks().line = python_line();
  if (engine->stall_ns == stalled) return;
  for (const auto& [line, fetch] : engine->fetches)
    if (auto& noted = Watched::of(*engine).waits[line]; noted != fetch.count)
      here.remarks().waits[line] += fetch.count - noted, noted = fetch.count;
}

static void watched(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  watch([&] { intercept(op, keys, stack); });
}

}  // namespace regraft
