// Running a compiled stretch.
#pragma once
#include "ahead.h"

namespace regraft {

// Whether no memory that is written is shared with another tensor. What is still to be made is not.
inline bool apart(const std::vector<at::Tensor>& values, const std::vector<uint32_t>& inputs,
                  const std::vector<uint32_t>& writes) {
  if (writes.empty()) return true;
  ska::flat_hash_map<const c10::StorageImpl*, int> users;
  for (auto input : inputs)
    if (values[input].defined()) ++users[values[input].storage().unsafeGetStorageImpl()];
  return std::all_of(writes.begin(), writes.end(), [&](uint32_t input) {
    return users[values[input].storage().unsafeGetStorageImpl()] == 1;
  });
}

// What a piece is given from outside; false where it cannot be given that.
template <typename Entries>
inline bool gather(const Segment& segment, const Piece& piece, Entries&& entries,
                   std::vector<at::Tensor>& values) {
  for (auto value : piece.inputs) {
    if (value >= segment.inputs.size() || values[value].defined()) continue;
    const auto& place = segment.inputs[value];
    values[value] = at_place(entries[place.entry], place.tensor);
  }
  return apart(values, piece.inputs, piece.writes);
}

inline at::Tensor& numbers_of(const Segment& segment, std::vector<at::Tensor>& values) {
  auto& numbers = values[segment.inputs.size()];
  if (!numbers.defined()) numbers = at::empty({static_cast<int64_t>(segment.given)}, at::kDouble);
  return numbers;
}

// The pieces that have not begun; false where nothing is to be left of any.
inline bool run_pieces(Stretch& stretch, Entry* entries, const std::vector<double>& given,
                       Ahead& ahead) {
  const auto& segment = *stretch.segment;
  auto& values = ahead.values;
  values.resize(segment.values);
  c10::NoGradGuard no_grad;
  if (segment.given)
    std::copy(given.begin(), given.end(), numbers_of(segment, values).mutable_data_ptr<double>());
  for (size_t k = ahead.begun; k < segment.pieces.size(); ++k)
    if (!gather(segment, segment.pieces[k], entries, values))
      return stretch.drop("tensors came to share memory"), false;
  bool clean = true;
  try {
    py::gil_scoped_release unlocked;
    for (size_t k = ahead.begun; k < segment.pieces.size(); ++k) {
      clean &= segment.pieces[k].writes.empty();
      segment.pieces[k].run(values);
    }
  } catch (...) {
    if (clean) return stretch.drop("a piece raised"), false;
    throw;
  }
  std::vector<at::Tensor> made;
  for (const auto& view : segment.results) made.push_back(view.of(values));
  ahead.settle();
  for (size_t i = 0; i < made.size(); ++i) {
    const auto& [entry, result] = segment.outputs[i];
    give(entries[entry].outs[result].get(), std::move(made[i]));
  }
  return true;
}

inline bool run_function(Stretch& stretch, Entry* entries, const std::vector<double>& given) {
  const auto& segment = *stretch.segment;
  std::vector<at::Tensor> tensors;
  std::vector<uint32_t> all;
  for (const auto& place : segment.inputs) {
    all.push_back(tensors.size());
    tensors.push_back(at_place(entries[place.entry], place.tensor));
  }
  if (!apart(tensors, all, segment.writes))
    return stretch.drop("tensors came to share memory"), false;
  c10::AutoGradMode mode(segment.grad);
  py::list inputs(tensors.size() + !given.empty());
  for (size_t i = 0; i < tensors.size(); ++i)
    inputs[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensors[i])));
  if (!given.empty()) inputs[tensors.size()] = py::cast(at::tensor(given, at::kDouble));
  auto results =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(segment.call, inputs.ptr()));
  if (!results) throw py::error_already_set();
  inputs = py::list();
  std::vector<at::Tensor> made;
  for (auto item : results) made.push_back(THPVariable_Unpack(item.ptr()));
  results = py::object();
  for (size_t i = 0; i < made.size(); ++i) {
    const auto& [entry, result] = segment.outputs[i];
    give(entries[entry].outs[result].get(), std::move(made[i]));
  }
  return true;
}

// Runs the entries of a segment; false where they do not fit it: those that did not run are to be
// replayed.
inline bool run_segment(Tape& tape, Stretch& stretch, Entry* entries, Ahead& ahead) {
  auto& segment = *stretch.segment;
  std::vector<double> given;
  size_t n = 0;
  bool fits = true;
  for (size_t e = 0; e < stretch.length; ++e)
    each_number(entries[e], [&](size_t, int32_t, Given number) {
      auto& known = stretch.numbers[n++];
      if (segment.runs_first(e)) return;
      if (known.varies) given.push_back(number.value);
      else if (known.given.bits != number.bits) known.varies = true, fits = false;
    });
  if (!fits) return stretch.drop("a number changed"), false;
  const auto before = stretch.wanted.size();
  const Owners owners(entries, entries + stretch.length, ahead.values);
  for (uint32_t e = 0; e < stretch.length; ++e)
    for (uint32_t i = 0; i < entries[e].outs.size(); ++i)
      if (const auto& out = entries[e].outs[i]; out && owners.others(out.get()))
        stretch.wanted.insert({e, i});
  if (stretch.wanted.size() != before) return stretch.drop("another result was kept"), false;
  if (!segment.first.empty()) {
    py::gil_scoped_release unlocked;
    for (auto e : segment.first) tape.run_or_fail(entries[e]);
  }
  if (tape.error) return false;
  try {
    const bool ran = segment.pieces.empty() ? run_function(stretch, entries, given)
                                            : run_pieces(stretch, entries, given, ahead);
    if (ran) ++stretch.launches;
    return ran;
  } catch (...) {
    tape.fail("a compiled function");
    return false;
  }
}

}  // namespace regraft
