// The Python module.
#include <torch/library.h>

#include "watch.h"

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&regraft::watched>());
}
TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&regraft::materialise>());
}

// torch's bernoulli_ with its result as a tensor of its own.
TORCH_LIBRARY(regraft_coexec, m) {
  m.def("bernoulli(Tensor like, float p) -> Tensor", {at::Tag::nondeterministic_seeded});
}
TORCH_LIBRARY_IMPL(regraft_coexec, CompositeExplicitAutograd, m) {
  m.impl("bernoulli", [](const at::Tensor& like, double p) {
    return at::empty_like(like).bernoulli_(p);
  });
}

namespace regraft {

// Engines are reused, never freed: placeholders may outlive the function they come from.
static std::vector<Engine*>& engines() {
  static auto& all = *new std::vector<Engine*>();
  return all;
}

// Errors of torch keep their Python types.
template <typename F>
static auto translated(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (py::error_already_set&) {
    throw;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    throw py::error_already_set();
  }
}

static void include(bool on) { c10::impl::tls_set_dispatch_key_included(MODE, on); }
static bool included() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(MODE);
}

// Values that this tensor needs are there afterwards; null: all of this thread, or of all threads.
static void sync(const std::optional<at::Tensor>& tensor) {
  if (Tape::running_here()) return;  // a compiled function is at work
  if (tensor)
    if (const auto* placeholder = as_pending(*tensor)) {
      if (placeholder->engine == Engine::active()) fetch(*Engine::active());
      else Engine::materialise(placeholder);
      if (Engine::active()) Engine::active()->touch(*tensor);
      return;
    }
  if (Engine::active()) {
    if (!tensor || Engine::active()->depends(*tensor)) watch([] { fetch(*Engine::active()); });
    if (tensor) Engine::active()->touch(*tensor);
    return;
  }
  for (auto* engine : engines())
    if (!engine->tape.idle()) {
      py::gil_scoped_release unlocked;
      engine->tape.drain();
    }
}

static bool enter(Engine& engine, bool anchored, bool overlap, const py::object& compiler) {
  if (Engine::active()) return false;
  engine.anchored = anchored, engine.tape.aside = overlap && compiler.is_none();
  engine.begins = overlap;
  engine.compiler = compiler.is_none() ? nullptr : compiler.ptr();
  engine.restart_path();
  Watched::of(engine).entered = now();
  Engine::active() = &engine;
  include(true);
  return true;
}

static void leave(Engine& engine) {
  include(false);
  struct Reset {
    Engine& engine;
    ~Reset() {
      Engine::active() = nullptr, engine.restart_path();
      Watched::of(engine).inside_ns += now() - Watched::of(engine).entered;
    }
  } reset{engine};
  engine.flush();
}

// A piece: where it ends, the address of its code, the values that it is given, makes and writes.
using Part = std::tuple<uint32_t, uintptr_t, std::vector<uint32_t>, std::vector<uint32_t>,
                        std::vector<uint32_t>>;
using Numbers = std::vector<int64_t>;
using Shown = std::tuple<uint32_t, Numbers, Numbers, Numbers, int64_t>;

// inputs: (entry, tensor) pairs; outputs: (entry, result) pairs; varying: numbers it is given;
// results: what the outputs are of the values of pieces.
static void attach(Stretch& stretch, py::object call,
                   const std::vector<std::pair<uint32_t, int32_t>>& inputs,
                   const std::vector<Result>& outputs, const std::vector<uint32_t>& first,
                   const std::vector<uint32_t>& writes, const std::set<size_t>& varying,
                   const std::vector<Part>& pieces, const std::vector<Shown>& results,
                   bool random, bool grad, bool cuda, double seconds) {
  auto segment = std::make_unique<Segment>();
  for (const auto& [entry, tensor] : inputs) segment->inputs.push_back({entry, tensor});
  segment->outputs = outputs, segment->first = first, segment->writes = writes;
  segment->random = random, segment->grad = grad, segment->cuda = cuda;
  for (const auto& [value, base, sizes, strides, offset] : results)
    segment->results.push_back({value, base, sizes, strides, offset});
  segment->values = inputs.size() + 1;
  for (const auto& [end, address, given, made, written] : pieces) {
    segment->pieces.push_back({end, reinterpret_cast<Piece::Call>(address), given, made, written});
    segment->values += made.size();
  }
  stretch.warm = cuda ? 6 : 2;
  segment->call = call.release().ptr();
  for (size_t i = 0; i < stretch.numbers.size(); ++i) stretch.numbers[i].varies = varying.count(i);
  segment->given = varying.size();
  stretch.compile_s += seconds;
  stretch.segment = std::move(segment);
}

static py::dict stats(Engine& engine) {
  py::dict d;
  d["deferred"] = engine.deferred, d["recorded"] = engine.recorded;
  d["at_once"] = engine.at_once, d["backwards"] = engine.backwards;
  d["backwards_eager"] = engine.backwards_eager, d["stall_s"] = engine.stall_ns * 1e-9;
  d["executed_here"] = engine.tape.executed_here.load();
  d["executed_aside"] = engine.tape.executed_aside.load();
  d["aside_s"] = engine.tape.aside_ns.load() * 1e-9;
  d["graph_stall_s"] = Watched::of(engine).idle_ns() * 1e-9;
  d["nodes"] = engine.graph->size(), d["reasons"] = engine.reasons;
  py::dict fetches;
  for (const auto& [line, fetch] : engine.fetches)
    fetches[py::str(line)] = py::make_tuple(fetch.count, fetch.ns * 1e-9);
  d["fetches"] = fetches;
  py::list paths;
  for (const auto& [node, depth] : engine.graph->ends())
    paths.append(py::make_tuple(depth, node->ends));
  d["paths"] = paths;
  py::list segments;
  double seconds = 0;
  int64_t ahead = 0, strayed = 0;
  for (const auto& stretch : engine.stretches) {
    seconds += stretch->compile_s, ahead += stretch->ahead, strayed += stretch->strayed;
    segments.append(py::make_tuple(stretch->length, stretch->launches, stretch->compile_s,
                                   stretch->segment ? "compiled" : stretch->state));
  }
  d["segments"] = segments, d["compile_s"] = seconds, d["ahead"] = ahead, d["strayed"] = strayed;
  return d;
}

// The nodes of the trace graph, parents first: number of the parent (-1: the beginning), operator,
// visits, paths that ended there, the program's line where paths part, lines that waited there.
static py::list trace(const Engine& engine) {
  py::list nodes;
  std::vector<std::pair<const TraceNode*, int64_t>> todo;
  auto children = [&](const TraceNode* node, int64_t number) {
    for (auto child = node->children.rbegin(); child != node->children.rend(); ++child)
      todo.emplace_back(child->get(), number);
  };
  children(engine.graph->root(), -1);
  while (!todo.empty()) {
    const auto [node, parent] = todo.back();
    todo.pop_back();
    children(node, nodes.size());
    const static Remark none;
    const auto& remark = node->remark ? *node->remark : none;
    nodes.append(py::make_tuple(parent, node->memo ? node->memo->info->name : "backward",
                                node->visits, node->ends, remark.line, remark.waits));
  }
  return nodes;
}

}  // namespace regraft

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace regraft;
  py::class_<Stretch, std::shared_ptr<Stretch>>(m, "Stretch")
      .def("refuse", [](Stretch& s, const std::string& why, double seconds,
                        const std::vector<size_t>& cuts) {
        s.refuse(why), s.compile_s += seconds, s.cuts = cuts;
      })
      .def("attach", &attach);
  py::class_<Engine, std::unique_ptr<Engine, py::nodelete>>(m, "Engine")
      .def("enter", &enter)
      .def("leave", [](Engine& e) { translated([&] { leave(e); }); })
      .def("stats", &stats)
      .def("trace", &trace)
      .def("forget", [](Engine& e) { translated([&] { e.flush(), Watched::of(e).clear(); }); });
  m.def("new_engine", [] {
    engines().push_back(new Watched());
    engines().back()->prepare();
    return engines().back();
  }, py::return_value_policy::reference);
  m.def("least", [](size_t operators) { return std::exchange(least, operators); });
  // What a compiled function does is none of the program's.
  m.def("active", [] {
    return Engine::active() && !Engine::active()->paused && !Tape::running_here();
  });
  m.def("pause", [](bool on) { if (Engine::active()) Engine::active()->paused = on; });
  m.def("sync", [](const std::optional<at::Tensor>& t) { translated([&] { sync(t); }); },
        py::arg("tensor") = py::none());
  m.def("is_pending", [](const at::Tensor& t) { return as_pending(t) != nullptr; });
  m.def("escape", [](const at::Tensor& t) {
    return reinterpret_cast<uintptr_t>(Foreign::escape(t));
  });
  m.def("give_back", [](uintptr_t storage) {
    Foreign::give_back(reinterpret_cast<const void*>(storage));
  });
  // The interceptor off on this thread; what was there before.
  m.def("suspend", [] {
    const bool on = included();
    if (on) include(false);
    return on;
  });
  m.def("resume", [](bool on) { if (on) include(true); });
  m.def("taint", [] { if (Engine::active()) Engine::active()->taint(); });
  m.def("backward", [](const std::vector<at::Tensor>& roots, const std::vector<at::Tensor>& seeds,
                       bool keep_graph) {
    return translated([&] {
      return static_cast<int>(Engine::active()->begin_backward(roots, seeds, keep_graph));
    });
  });
  m.def("end_backward", [] { translated([] { Engine::active()->end_backward(); }); });
  m.def("before_fork", [] {
    py::gil_scoped_release unlocked;
    for (auto* engine : engines()) engine->tape.before_fork();
  });
  m.def("after_fork_in_parent", [] {
    for (auto* engine : engines()) engine->tape.after_fork_in_parent();
  });
  m.def("after_fork_in_child", [] {
    for (auto* engine : engines())
      engine->tape.after_fork_in_child(), engine->ahead->after_fork_in_child();
  });
  m.def("stop_workers", [] {
    py::gil_scoped_release unlocked;
    for (auto* engine : engines())
      engine->tape.drain(), engine->tape.stop_worker(), engine->ahead->stop_worker();
  });
  m.def("own_folder", [](const std::string& folder) { own_folder() = folder; });
}
