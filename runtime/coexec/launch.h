// Which stretches of the tape are compiled, and running them.
#pragma once
#include "run.h"

namespace regraft {

inline size_t least = 16;  // operators worth a function
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

inline void Engine::prepare() {
  ahead = new Ahead();
  tape.before_drain = [this] { ahead->take_back(); };
}

// Python has come to where a piece of the stretch that came here last may begin.
inline void Engine::go_ahead(const TraceNode& node) {
  const auto stretch = node.foreseen;
  const auto k = node.piece;
  const auto* segment = stretch->segment.get();
  if (!segment || k + 1 >= segment->pieces.size() || tape.error) return;
  if (k > 0 ? ahead->stretch != stretch || ahead->begun != k
            : ahead->stretch || stretch->kind() == 0)
    return;
  const auto& piece = segment->pieces[k];
  const auto from = k > 0 ? segment->pieces[k - 1].end : 0;
  c10::impl::ExcludeDispatchKeyGuard guard(MODE);
  c10::NoGradGuard no_grad;
  tape.look([&](std::deque<Entry>& entries) {
    if (entries.size() != piece.end || entries[0].node != stretch->start) return;
    if (segment->runs_first(piece.end - 1)) return;  // torch may still be making a copy of it
    if (k == 0) ahead->values.assign(segment->values, at::Tensor());
    double* numbers =
        segment->given ? numbers_of(*segment, ahead->values).mutable_data_ptr<double>() : nullptr;
    bool fits = true;
    for (size_t e = from; e < piece.end; ++e)
      each_number(entries[e], [&](size_t, int32_t, Given number) {
        const auto& known = stretch->numbers[ahead->numbers++];
        if (segment->runs_first(e)) return;
        if (known.varies) numbers[ahead->given++] = number.value;
        else fits &= known.given.bits == number.bits;
      });
    if (!fits || !gather(*segment, piece, entries, ahead->values)) {
      if (k == 0) ahead->settle();
      return;
    }
    std::vector<Entry*> first;
    for (auto e : segment->first)
      if (e >= from && e < piece.end) first.push_back(&entries[e]);
    ahead->stretch = stretch, ahead->begun = k + 1;
    ahead->submit([this, segment, &piece, k, first = std::move(first)] {
      for (auto* entry : first) tape.run_or_fail(*entry);
      if (tape.error || ahead->raised) return;
      try {
        if (k == 0 && segment->random) ahead->keep_random();
        for (auto value : piece.writes) ahead->keep(ahead->values[value]);
        piece.run(ahead->values);
      } catch (...) {
        ahead->raised = true;
      }
    });
  });
}

// Next time the stretch may begin before all of it has come.
inline void foresee(const std::shared_ptr<Stretch>& stretch, Entry* entries) {
  const auto& pieces = stretch->segment->pieces;
  for (size_t k = 0; k + 1 < pieces.size(); ++k) {
    auto* node = entries[pieces[k].end - 1].node;
    if (!stretch->foreseeable()) node->foreseen.reset();
    else if (node->foreseen != stretch) node->foreseen = stretch, node->piece = k;
  }
}

// What has begun of one stretch is the beginning of another too.
inline bool begins_alike(const Stretch& begun, const Stretch& other, size_t pieces) {
  if (!begun.segment || !other.segment || begun.segment->call != other.segment->call) return false;
  const auto same = [](const Piece& a, const Piece& b) { return a.end == b.end; };
  const auto& mine = begun.segment->pieces;
  return std::equal(mine.begin(), mine.begin() + pieces, other.segment->pieces.begin(), same);
}

inline void Engine::launch() {
  if (ahead->stretch) {
    py::gil_scoped_release unlocked;
    ahead->wait();
  }
  tape.drain_by([&](std::vector<Entry>& batch) {
    const auto lengths = compiled(batch);
    if (ahead->stretch) {
      py::gil_scoped_release unlocked;
      const auto came = lengths[0] ? batch[lengths[0] - 1].node->stretch : nullptr;
      const bool right = came && (came == ahead->stretch ||
                                  begins_alike(*ahead->stretch, *came, ahead->begun));
      if (!right || ahead->raised || tape.error) ahead->take_back();
      else ahead->stretch = came, ++came->ahead;
    }
    // a compiler at work takes the GIL from functions, not from replay: that is no fair trial
    const auto waiting = py::reinterpret_borrow<py::object>(compiler).attr("waiting");
    const bool busy = waiting.cast<int>() > 0;
    auto replay = [&](size_t from, size_t to) {
      py::gil_scoped_release unlocked;
      ahead->take_back(), ahead->settle();
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
      const int kind = tape.error ? 0 : busy || ahead->stretch ? 1 : stretch->kind();
      const bool fits = kind != 0 && run_segment(tape, *stretch, &batch[at], *ahead);
      if (!fits) replay(at, end);
      else foresee(stretch, &batch[at]);
      if (waits) wait_for_device();
      const bool ran = fits ? !tape.error : kind == 0;
      if (trial && ran) stretch->time(kind, now() - start);
      at = end;
    }
  });
}

}  // namespace regraft
