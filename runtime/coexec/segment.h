// Stretches of the tape that one compiled function stands for.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <set>

#include "engine.h"

namespace regraft {

namespace py = pybind11;

// A tensor argument of an entry, counted through lists, or its result -1 - tensor.
struct Place {
  uint32_t entry;
  int32_t tensor;
};

// A number as it was given: equal to another in every bit, or not.
struct Given {
  bool whole;
  int64_t bits;
  double value;

  explicit Given(int64_t number) : whole(true), bits(number), value(number) {}
  explicit Given(double number)
      : whole(false), bits(c10::bit_cast<int64_t>(number)), value(number) {}
};

// A number that no metadata depend on; item: of a list.
struct Number {
  uint32_t entry, argument;
  int32_t item;
  Given given;
  bool varies = false;
};

using Result = std::pair<uint32_t, uint32_t>;  // an entry and which of its results

// A compiled part of a stretch, called without Python. Values by number: the segment's inputs, the
// numbers that vary in one tensor where there are some, then what pieces give.
struct Piece {
  using Call = void (*)(AtenTensorHandle*, AtenTensorHandle*);  // takes the inputs' handles

  uint32_t end;  // entries before it are done with this piece
  Call call;
  std::vector<uint32_t> inputs, outputs, writes;

  void run(std::vector<at::Tensor>& values) const {
    auto handle = [](at::Tensor* t) { return reinterpret_cast<AtenTensorHandle>(t); };
    std::vector<AtenTensorHandle> given, made(outputs.size());
    for (auto value : inputs) given.push_back(handle(new at::Tensor(values[value])));
    call(given.data(), made.data());
    for (size_t i = 0; i < made.size(); ++i) {
      std::unique_ptr<at::Tensor> result(reinterpret_cast<at::Tensor*>(made[i]));
      values[outputs[i]] = std::move(*result);
    }
    for (auto value : writes) values[value].unsafeGetTensorImpl()->bump_version();
  }
};

// What a result is of a value: its strides, the result's sizes, strides and offset.
struct View {
  uint32_t value;
  std::vector<int64_t> base, sizes, strides;
  int64_t offset;

  at::Tensor of(std::vector<at::Tensor>& values) const {
    auto& tensor = values[value];
    if (tensor.strides() != base)  // as many elements, laid out otherwise
      tensor = at::empty_strided(tensor.sizes(), base, tensor.options()).copy_(tensor);
    if (tensor.sizes() == sizes && tensor.strides() == strides) return tensor;
    return at::as_strided(tensor, sizes, strides, tensor.storage_offset() + offset);
  }
};

struct Segment {
  std::vector<Place> inputs;
  std::vector<Result> outputs;
  std::vector<Piece> pieces;     // in place of `call` where there are some
  std::vector<View> results;     // of the pieces, for each output
  size_t values = 0;              // of the pieces
  size_t given = 0;               // numbers that vary
  bool random = false;
  std::vector<uint32_t> first;   // entries that run as they are, before the function
  bool grad = false;             // later backward passes go through it
  bool cuda = false;
  std::vector<uint32_t> writes;  // inputs, none of which may share memory with another
  PyObject* call;  // list of tensors -> list of tensors, numbers that vary last; or pieces' owner

  bool runs_first(uint32_t entry) const {
    return std::binary_search(first.begin(), first.end(), entry);
  }
  ~Segment() {
    py::gil_scoped_acquire locked;
    Py_XDECREF(call);
  }
};

// Operators that were put off together, from `start` to the node that has this.
struct Stretch {
  static constexpr int TRIALS = 8, MISSES = 4;

  TraceNode* start = nullptr;
  size_t length = 0;
  std::vector<Number> numbers;
  std::set<Result> wanted;  // results that Python still had
  bool asked = false;
  std::unique_ptr<Segment> segment;
  std::vector<size_t> cuts;  // refused as a whole: entries between whose others it may be compiled
  std::string state = "watched";
  int64_t seen = 0, launches = 0, misses = 0, ahead = 0, strayed = 0;
  double compile_s = 0;
  size_t warm = 2;  // first calls of the function, which are not like later ones
  std::vector<int64_t> times[2];  // of replay, of the function

  // It does not fit what came: another one is made, for both.
  void drop(const char* why) {
    segment.reset(), times[1].clear();
    asked = ++misses > MISSES;
    state = why;
  }
  void refuse(const std::string& why) { state = why; }

  // The next run is to be timed by replay, by the function, or is settled.
  int kind() const {
    if (settled()) return 1;
    return times[1].size() < warm || times[1].size() - warm <= times[0].size();
  }
  // Whether it pays to begin before it is sure to come.
  bool foreseeable() const { return strayed * 8 <= launches + 16; }
  bool settled() const { return times[0].size() >= TRIALS && times[1].size() >= TRIALS + warm; }

  void time(int kind, int64_t ns) {
    if (settled()) return;
    times[kind].push_back(ns);
    if (!settled()) return;
    times[1].erase(times[1].begin(), times[1].begin() + warm);
    auto median = [](std::vector<int64_t> t) {
      std::nth_element(t.begin(), t.begin() + t.size() / 2, t.end());
      return t[t.size() / 2];
    };
    const auto replayed = median(times[0]), called = median(times[1]);
    times[1].resize(TRIALS + warm);
    if (called > replayed) segment.reset(), refuse("slower than replay");
  }
};

template <typename F>
inline void each_tensor(const c10::IValue* values, size_t count, F&& f) {
  for (size_t i = 0; i < count; ++i) {
    if (values[i].isTensor()) f(values[i].toTensor(), i);
    else if (values[i].isList())
      for (const auto& item : values[i].toListRef())
        if (item.isTensor()) f(item.toTensor(), i);
  }
}

template <typename F>
inline void each_given(const Entry& entry, F&& f) {
  if (!entry.backward) {
    each_tensor(entry.args.data(), entry.args.size(), [&](const at::Tensor& t, size_t) { f(t); });
    return;
  }
  const auto& job = *entry.backward;
  for (const auto* list : {&job.roots, &job.seeds, &job.leaves, &job.sums})
    for (const auto& tensor : *list) f(tensor);
}

inline at::Tensor at_place(const Entry& entry, int32_t place) {
  if (place < 0) return at::Tensor(c10::intrusive_ptr<c10::TensorImpl>(entry.outs[-1 - place]));
  at::Tensor found;
  each_given(entry, [&](const at::Tensor& t) {
    if (place-- == 0) found = t;
  });
  return found;
}

// The value of a Python number that came as a tensor.
inline std::optional<Given> wrapped(const at::Tensor& t) {
  if (!t.defined() || !t.unsafeGetTensorImpl()->is_wrapped_number() || !t.is_cpu() ||
      as_pending(t) || t.is_complex())
    return std::nullopt;
  if (t.scalar_type() == at::kDouble)
    return Given(*static_cast<const double*>(t.const_data_ptr()));
  return t.is_floating_point() ? Given(t.item<double>()) : Given(t.item<int64_t>());
}

// f(argument, item, number) for each.
template <typename F>
inline void each_number(const Entry& entry, F&& f) {
  if (entry.backward) return;
  const auto& info = *entry.memo->info;
  for (size_t i = 0; i < entry.args.size(); ++i) {
    const auto& value = entry.args[i];
    auto number = [&](const c10::IValue& v, int32_t item) {
      if (v.isInt()) f(i, item, Given(v.toInt()));
      else if (v.isDouble()) f(i, item, Given(v.toDouble()));
    };
    if (value.isTensor()) {
      if (const auto found = wrapped(value.toTensor())) f(i, -1, *found);
    } else if (static_cast<int>(i) == info.index || info.value_free[i]) {
      if (!value.isList()) number(value, -1);
      else
        for (size_t j = 0; j < value.toListRef().size(); ++j) number(value.toListRef()[j], j);
    }
  }
}

// Who else than the tape's entries from `begin` to `end` has a result of theirs.
class Owners {
 public:
  Owners(const Entry* begin, const Entry* end, const std::vector<at::Tensor>& own = {}) {
    for (const auto* entry = begin; entry != end; ++entry) {
      for (const auto& out : entry->outs) if (out) ++held_[out.get()];
      each_given(*entry, [&](const at::Tensor& t) {
        if (!t.defined()) return;
        auto place = held_.find(t.unsafeGetTensorImpl());
        if (place != held_.end()) ++place->second;
      });
    }
    for (const auto& t : own) {
      auto place = t.defined() ? held_.find(t.unsafeGetTensorImpl()) : held_.end();
      if (place != held_.end()) ++place->second;
    }
  }
  bool others(const PlaceholderImpl* out) const {
    auto* object = out->pyobj_slot()->load_pyobj();
    const size_t own = held_.at(out) + (object ? 1 : 0);
    return c10::raw::intrusive_ptr::use_count(const_cast<PlaceholderImpl*>(out)) > own ||
        (object && Py_REFCNT(object) > 1);
  }

 private:
  ska::flat_hash_map<const c10::TensorImpl*, size_t> held_;
};

// The graph behind a result was differentiated with it, and is gone.
struct Spent : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&&) override {
    TORCH_CHECK(false, "Trying to backward through the graph a second time (or directly access "
                "saved tensors after they have already been freed). Specify retain_graph=True if "
                "you need to backward through the graph a second time.");
  }
  std::string name() const override { return "SpentBackward"; }
};

// torch counts references to nodes in one way or the other, by version.
template <typename Owner, typename Node>
Owner new_node() {
  if constexpr (std::is_constructible_v<Owner, std::shared_ptr<Node>>)
    return std::make_shared<Node>();
  else
    return c10::make_intrusive<Node>();
}

inline void give(PlaceholderImpl* out, at::Tensor made) {
  auto* impl = made.unsafeGetTensorImpl();
  if (impl->sizes() != out->sizes() || impl->dtype() != out->dtype())
    throw std::runtime_error("regraft: a compiled function gave a result of another shape");
  const bool graph = out->predicted_grad && impl->requires_grad();
  c10::AutoGradMode mode(graph);
  if (impl->strides() != out->strides()) {
    if (made.storage().use_count() != 1)
      throw std::runtime_error("regraft: a compiled function gave a view of another layout");
    made = at::empty_strided(out->sizes(), out->strides(), made.options().requires_grad(false))
               .copy_(graph ? made : made.detach());
  } else if (graph ? made.use_count() != 1 : made.use_count() != 1 || impl->requires_grad()) {
    made = graph ? at::alias(made)
                 : at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), true));
  }
  if (out->predicted_grad && !graph) {
    auto spent = new_node<decltype(torch::autograd::Edge::function), Spent>();
    spent->add_input_metadata(made);
    torch::autograd::impl::set_gradient_edge(made, torch::autograd::Edge(std::move(spent), 0));
  }
  out->become(made.unsafeGetTensorImpl());
}

}  // namespace regraft
