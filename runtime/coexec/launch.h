// Which stretches of the tape are compiled, and running them.
#pragma once
#include "segment.h"

namespace regraft {

inline size_t least = 8;  // operators worth a function
constexpr int64_t WATCHED = 3;

// For each entry the length of the longest compiled stretch that begins there, or 0.
inline std::vector<size_t> compiled(const std::vector<Entry>& batch) {
  std::vector<size_t> lengths(batch.size(), 0);
  for (size_t i = 0; i < batch.size(); ++i) {
    auto* node = batch[i].node;
    if (!node || !node->stretch || !node->stretch->segment) continue;
    const auto length = node->stretch->length;
    if (length <= i + 1 && batch[i + 1 - length].node == node->stretch->start)
      lengths[i + 1 - length] = length;
  }
  return lengths;
}

inline py::object as_python(const c10::IValue& value, const c10::Argument& argument) {
  auto type = argument.real_type();
  if (const auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  if (value.isInt() && type->kind() == c10::TypeKind::ScalarTypeType)
    return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(
        torch::getTHPDtype(static_cast<at::ScalarType>(value.toInt()))));
  return torch::jit::toPyObject(value);
}

inline py::object wrap(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

inline py::tuple describe(const Entry& entry) {
  py::list args, given, outs;
  each_given(entry, [&](const at::Tensor& t) { given.append(wrap(t)); });
  for (const auto& out : entry.outs)
    outs.append(out ? wrap(at::Tensor(c10::intrusive_ptr<c10::TensorImpl>(out))) : py::none());
  if (entry.backward) {
    const auto& job = *entry.backward;
    py::list counts;
    counts.append(job.roots.size()), counts.append(job.leaves.size()), counts.append(job.keep_graph);
    return py::make_tuple("", "", counts, entry.grad, given, outs);
  }
  const auto& schema = entry.memo->op.schema();
  for (size_t i = 0; i < entry.args.size(); ++i)
    args.append(as_python(entry.args[i], schema.arguments()[i]));
  return py::make_tuple(schema.name(), schema.overload_name(), args, entry.grad, given, outs);
}

// Watches operators that were put off together; asks for a function once they came often enough.
inline void watch(Engine& engine, Entry* begin, size_t length) {
  if (length < least || !begin[length - 1].node) return;
  auto* node = begin[length - 1].node;
  for (size_t i = 1; i < length; ++i)
    if (!begin[i].node || begin[i].node->parent != begin[i - 1].node) return;
  if (!node->stretch || (node->stretch->start != begin->node && !node->stretch->asked)) {
    node->stretch = std::make_shared<Stretch>();
    node->stretch->start = begin->node, node->stretch->length = length;
    engine.stretches.push_back(node->stretch);
  }
  auto& stretch = *node->stretch;
  if (stretch.start != begin->node) return;
  if (!stretch.cuts.empty()) {
    size_t from = 0;
    for (auto cut : stretch.cuts) watch(engine, begin + from, cut - from), from = cut + 1;
    return watch(engine, begin + from, length - from);
  }
  if (stretch.asked) return;
  size_t n = 0;
  for (uint32_t e = 0; e < length; ++e)
    each_number(begin[e], [&](size_t argument, int32_t item, Given given) {
      if (stretch.seen == 0)
        stretch.numbers.push_back({e, static_cast<uint32_t>(argument), item, given});
      else if (stretch.numbers[n].given.bits != given.bits) stretch.numbers[n].varies = true;
      ++n;
    });
  const Owners owners(begin, begin + length);
  for (uint32_t e = 0; e < length; ++e)
    for (uint32_t i = 0; i < begin[e].outs.size(); ++i)
      if (begin[e].outs[i] && owners.others(begin[e].outs[i].get())) stretch.wanted.insert({e, i});
  if (++stretch.seen < WATCHED) return;
  stretch.asked = true, stretch.state = "being compiled";
  py::list entries, numbers, wanted;
  for (size_t e = 0; e < length; ++e) entries.append(describe(begin[e]));
  for (const auto& x : stretch.numbers) {
    const py::object value = x.given.whole ? py::object(py::int_(x.given.bits))
                                           : py::object(py::float_(x.given.value));
    numbers.append(py::make_tuple(x.entry, x.argument, x.item, value, x.varies));
  }
  for (const auto& result : stretch.wanted) wanted.append(py::make_tuple(result.first, result.second));
  py::reinterpret_borrow<py::object>(engine.compiler)(node->stretch, entries, numbers, wanted);
}

inline void wait_for_device() { py::module_::import("torch.cuda").attr("synchronize")(); }

inline void Engine::launch() {
  tape.drain_by([&](std::vector<Entry>& batch) {
    const auto lengths = compiled(batch);
    // a compiler at work takes the GIL from functions, not from replay: that is no fair trial
    const auto waiting = py::reinterpret_borrow<py::object>(compiler).attr("waiting");
    const bool busy = waiting.cast<int>() > 0;
    auto replay = [&](size_t from, size_t to) {
      py::gil_scoped_release unlocked;
      for (size_t i = from; i < to; ++i) tape.run_or_fail(batch[i]);
    };
    for (size_t at = 0; at < batch.size();) {
      size_t end = at + lengths[at];
      if (end == at) {
        for (++end; end < batch.size() && !lengths[end];) ++end;
        if (!tape.error) watch(*this, &batch[at], end - at);
        replay(at, end);
        at = end;
        continue;
      }
      auto stretch = batch[end - 1].node->stretch;
      const bool trial = !busy && !stretch->settled() && !tape.error;
      const bool waits = trial && stretch->segment->cuda;
      if (waits) wait_for_device();
      const auto start = now();
      const int kind = tape.error ? 0 : busy ? 1 : stretch->kind();
      const bool fits = kind != 0 && run_segment(tape, *stretch, &batch[at]);
      if (!fits) replay(at, end);
      if (waits) wait_for_device();
      const bool ran = fits ? stretch->segment && !tape.error : kind == 0;
      if (trial && ran) stretch->time(kind, now() - start);
      at = end;
    }
  });
}

}  // namespace regraft
