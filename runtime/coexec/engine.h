// The Python side of co-execution for one thread: names tensors, predicts results, fills the tape.
#pragma once
#include <map>

#include "foreign.h"
#include "tape.h"

namespace regraft {

struct Slot {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  bool input;
};

struct Fetch {
  int64_t count = 0, ns = 0;
};

class Ahead;

class Engine {
 public:
  static constexpr size_t MOST_MEMOS = 50000, LONGEST_PATH = 20000;

  Tape tape;
  TraceGraph* graph = new TraceGraph();
  Metas metas;
  bool anchored = true, paused = false;
  bool begins = true;  // compiled stretches on another thread before they have come whole
  PyObject* compiler = nullptr;  // compiles stretches of operators; null: none are compiled
  int64_t deferred = 0, recorded = 0, at_once = 0, backwards = 0, backwards_eager = 0, stall_ns = 0;
  std::map<std::string, int64_t> reasons;
  std::map<std::string, Fetch> fetches;
  std::vector<std::shared_ptr<Stretch>> stretches;
  Ahead* ahead = nullptr;

  static Engine*& active() {
    thread_local Engine* engine = nullptr;
    return engine;
  }

  // ---- paths

  void restart_path() {
    if (cursor_ && cursor_ != graph->root()) ++cursor_->ends;
    ++epoch_;
    slots_.clear(), known_.clear(), storages_.clear();
    cursor_ = graph->root(), tainted_ = false, path_length_ = 0;
    if (memos_.size() > MOST_MEMOS && tape.idle()) forget();
  }

  // Drops all that was learned; the tape is empty.
  void forget() {
    delete graph;
    graph = new TraceGraph();
    cursor_ = graph->root();
    memos_.clear(), stretches.clear();
  }

  // As new, for another function.
  void clear() {
    restart_path(), forget();
    deferred = recorded = at_once = backwards = backwards_eager = stall_ns = 0;
    tape.executed_here = 0, tape.executed_aside = 0, tape.aside_ns = 0;
    reasons.clear(), fetches.clear();
  }

  // ---- the tape

  // All values are there afterwards. Raises what an operator on the tape raised.
  void flush();
  // Runs the tape, by compiled functions where there are some for its operators.
  void launch();
  // Begins a compiled stretch that is likely to come whole.
  void go_ahead(const TraceNode& node);
  void prepare();
  // The placeholder, of any thread, has its value afterwards, unless its operator raised.
  static void materialise(const PlaceholderImpl* placeholder);
  // Destroys finished entries, so that what Python dropped is freed.
  void collect();

  // ---- operators

  std::vector<uint64_t> key;
  std::vector<const at::Tensor*> tensors;
  std::vector<int> argument_of;
  std::vector<int32_t> wiring;

  // Fills the four above; the reason where the operator cannot be put off, else null.
  const char* encode(const OpInfo& info, const c10::IValue* args, size_t count, bool grad) {
    key.clear(), tensors.clear(), argument_of.clear(), wiring.clear();
    why_ = nullptr;
    key.push_back(info.id);
    key.push_back(grad |
                  static_cast<uint64_t>(c10::get_default_dtype_as_scalartype()) << 8);
    for (size_t i = 0; i < count && !why_; ++i) {
      if (info.index == static_cast<int>(i) && in_range(args)) key.push_back(11);
      else encode(args[i], info.value_free[i], i);
    }
    return why_;
  }

  Memo* memo() {
    auto found = memos_.find(key);
    return found == memos_.end() ? nullptr : found->second.get();
  }

  // What the operator gave for the arguments encoded last; barrier where that cannot be predicted.
  Memo* learn(const c10::OperatorHandle& op, const OpInfo& info, bool changed_grad,
              const std::vector<const c10::TensorImpl*>& given,
              const std::vector<bool>& known_outs, c10::ArrayRef<c10::IValue> results) {
    auto made = std::make_unique<Memo>(Memo{op, &info});
    made->barrier = changed_grad;
    size_t at = 0;
    std::vector<const c10::TensorImpl*> results_seen;
    auto add = [&](const at::Tensor& tensor) {
      OutSpec spec;
      if (!tensor.defined()) {
        spec.undefined = true, ++at;
        return made->outs.push_back(spec);
      }
      for (size_t i = 0; i < given.size() && spec.alias < 0; ++i)
        if (given[i] == tensor.unsafeGetTensorImpl()) spec.alias = i;
      const bool plain = typeid(*tensor.unsafeGetTensorImpl()) == typeid(c10::TensorImpl) &&
          !known_outs[at++] && has_backend(tensor.device()) && tensor.use_count() == 1;
      if (spec.alias < 0 && !plain) made->barrier = true;
      else if (spec.alias < 0) spec.meta = metas.intern(tensor.unsafeGetTensorImpl());
      for (const auto& other : results_seen) made->barrier |= other == tensor.unsafeGetTensorImpl();
      results_seen.push_back(tensor.unsafeGetTensorImpl());
      spec.grad = tensor.requires_grad();
      made->outs.push_back(spec);
    };
    for (const auto& value : results) {
      if (value.isTensor()) {
        made->returns.push_back(-1);
        add(value.toTensor());
      } else {
        auto items = value.toListRef();
        made->returns.push_back(items.size());
        for (const auto& item : items) add(item.toTensor());
      }
    }
    return (memos_[key] = std::move(made)).get();
  }

  // Names a result that was computed at once.
  void name(const at::Tensor& tensor) {
    if (tensor.defined() && !known_.count(tensor.unsafeGetTensorImpl()))
      known_[tensor.unsafeGetTensorImpl()] = {new_slot(tensor, false), metas.intern(tensor.unsafeGetTensorImpl())};
  }

  bool is_known(const at::Tensor& tensor) const {
    return tensor.defined() && known_.count(tensor.unsafeGetTensorImpl());
  }

  // Whether the tape may read or write what this tensor holds.
  bool depends(const at::Tensor& tensor) const {
    if (!tensor.defined()) return false;
    if (typeid(*tensor.unsafeGetTensorImpl()) != typeid(c10::TensorImpl)) return true;
    return storages_.count(tensor.storage().unsafeGetStorageImpl());
  }

  // The tape may come to write this memory through a tensor that it knows.
  void touch(const at::Tensor& tensor) {
    if (tensor.defined() && !as_pending(tensor) && tensor.has_storage())
      storages_.insert(tensor.storage().unsafeGetStorageImpl());
  }

  bool on_path(const at::Tensor& tensor) const {
    if (as_placeholder(tensor.unsafeGetTensorImpl()) || is_known(tensor)) return true;
    return storages_.count(tensor.storage().unsafeGetStorageImpl());
  }

  c10::intrusive_ptr<PlaceholderImpl> placeholder(uint32_t meta, bool grad, int32_t slot = -1) {
    const auto& m = metas[meta];
    auto made = c10::make_intrusive<PlaceholderImpl>(
        m.keys, m.dtype, m.device, m.sizes, m.strides, m.wrapped, this);
    if (grad) made->set_requires_grad(true);
    made->predicted_grad = grad, made->meta = meta, made->epoch = epoch_;
    made->slot = slot < 0 ? static_cast<int32_t>(slots_.size()) : slot;
    c10::weak_intrusive_ptr<c10::TensorImpl> weak{c10::intrusive_ptr<c10::TensorImpl>(made)};
    if (slot < 0) slots_.push_back({std::move(weak), false});
    else slots_[slot].tensor = std::move(weak);
    return made;
  }

  TraceNode* advance(const Memo* memo) {
    if (cursor_ && ++path_length_ > LONGEST_PATH) cursor_ = nullptr;
    if (cursor_) cursor_ = graph->step(cursor_, memo, wiring);
    return cursor_;
  }

  void put_off(Entry&& entry) {
    const auto* node = entry.node;
    tape.push(std::move(entry));
    if (begins && compiler && node && node->foreseen) go_ahead(*node);
    if (tape.waiting() > Tape::LONGEST) flush();
  }

  // ---- backward passes (backward.h)

  enum class Verdict { Deferred, Record, Eager };
  Verdict begin_backward(const std::vector<at::Tensor>& roots,
                         const std::vector<at::Tensor>& seeds, bool keep_graph);
  void end_backward();
  void taint() { tainted_ = true; }

 private:
  struct Known {
    int32_t slot;
    uint32_t meta;
  };
  struct Before {
    int32_t slot;
    at::Tensor leaf, grad;
    int64_t version;
  };

  int32_t new_slot(const at::Tensor& tensor, bool input) {
    slots_.push_back({c10::weak_intrusive_ptr<c10::TensorImpl>(tensor.getIntrusivePtr()), input});
    return slots_.size() - 1;
  }

  void encode(const at::Tensor& tensor, int argument) {
    tensors.push_back(&tensor), argument_of.push_back(argument);
    if (!tensor.defined()) {
      key.push_back(1), wiring.push_back(-1);
      return;
    }
    auto* impl = tensor.unsafeGetTensorImpl();
    const bool grad = tensor.requires_grad();
    auto* own = as_placeholder(impl);
    if (own && own->pending.load(std::memory_order_acquire)) {
      if (own->engine != this || own->epoch != epoch_) why_ = "a tensor that another thread computes";
      else if (own->predicted_grad != grad) why_ = "requires_grad was set on a tensor to come";
      wiring.push_back(own->slot);
      key.push_back(2 | static_cast<uint64_t>(grad) << 2 | static_cast<uint64_t>(own->meta) << 8);
      return;
    }
    if (!own && typeid(*impl) != typeid(c10::TensorImpl)) why_ = "a tensor of a special kind";
    else if (!has_backend(tensor.device())) why_ = "a device without back end";
    else if (impl->is_inference()) why_ = "an inference tensor";
    else if (impl->key_set().has_any(c10::python_ks)) why_ = "a tensor subclass";
    if (why_) return;
    if (!tensor.is_cpu()) tape.stay_here = true;  // its stream is the current one of this thread
    const bool leaf = !grad || tensor.is_leaf();
    uint32_t meta;
    if (own && own->engine == this && own->epoch == epoch_) {
      meta = metas[own->meta].matches(impl) ? own->meta : metas.intern(impl);
      wiring.push_back(own->slot);
      if (grad && leaf) tainted_ = true;
    } else {
      auto [place, fresh] = known_.emplace(impl, Known{});
      auto& known = place->second;
      if (fresh) {
        known.slot = new_slot(tensor, true);
        known.meta = metas.intern(impl);
      } else if (!metas[known.meta].matches(impl)) {
        known.meta = metas.intern(impl);
      }
      meta = known.meta;
      wiring.push_back(known.slot);
      // gradients of these are not told by the path
      if (grad && leaf != slots_[known.slot].input) tainted_ = true;
    }
    storages_.insert(tensor.storage().unsafeGetStorageImpl());
    key.push_back(2 | static_cast<uint64_t>(grad) << 2 | static_cast<uint64_t>(grad && leaf) << 3 |
                  static_cast<uint64_t>(meta) << 8);
  }

  void encode(const c10::IValue& value, bool value_free, int argument) {
    if (value.isTensor()) return encode(value.toTensor(), argument);
    if (value.isNone()) return key.push_back(3);
    if (value.isBool()) return key.push_back(4 | value.toBool() << 8);
    if (value.isInt()) {
      key.push_back(5 | value_free << 8);
      return key.push_back(value_free ? tag(value.toInt()) : value.toInt());
    }
    if (value.isDouble()) {
      key.push_back(6 | value_free << 8);
      const double number = value.toDouble();
      return key.push_back(value_free ? tag(number) : c10::bit_cast<uint64_t>(number));
    }
    if (value.isList()) {
      auto items = value.toListRef();
      key.push_back(7 | items.size() << 8);
      for (const auto& item : items) {
        if (why_) return;
        encode(item, value_free, argument);
      }
      return;
    }
    if (value.isString()) {
      const auto& text = value.toStringRef();
      key.push_back(8 | text.size() << 8);
      for (size_t i = 0; i < text.size(); i += 8) {
        uint64_t word = 0;
        memcpy(&word, text.data() + i, std::min<size_t>(8, text.size() - i));
        key.push_back(word);
      }
      return;
    }
    if (value.isDevice()) {
      const auto device = value.toDevice();
      if (!has_backend(device)) why_ = "a device without back end";
      return key.push_back(9 | static_cast<uint64_t>(device.index() + 1) << 8 |
                           static_cast<uint64_t>(device.type()) << 16);
    }
    if (value.isComplexDouble()) return key.push_back(10);
    why_ = value.isGenerator() ? "a generator of its own" : "an argument of a special kind";
  }

  // select's last argument: which item, of those that there are.
  static bool in_range(const c10::IValue* args) {
    const auto& tensor = args[0].toTensor();
    if (!tensor.defined() || !args[2].isInt()) return false;
    const auto rank = tensor.dim(), dim = args[1].toInt(), index = args[2].toInt();
    if (dim < -rank || dim >= rank) return false;
    const auto size = tensor.sizes()[dim < 0 ? dim + rank : dim];
    return index >= -size && index < size;
  }

  // Kernels branch on these values at most.
  static uint64_t tag(double number) {
    if (number == 0) return 0;
    if (number == 1) return 1;
    if (!std::isfinite(number)) return 4;
    return number < 0 ? 2 : 3;
  }

  bool hooked(const at::Tensor& leaf) const;

  std::unordered_map<std::vector<uint64_t>, std::unique_ptr<Memo>, Words> memos_;
  std::vector<Slot> slots_;
  ska::flat_hash_map<const c10::TensorImpl*, Known> known_;
  ska::flat_hash_set<const c10::StorageImpl*> storages_;
  TraceNode* cursor_ = graph->root();
  const char* why_ = nullptr;
  bool tainted_ = false;
  uint64_t epoch_ = 1;
  size_t path_length_ = 0;
  // a backward pass being recorded
  TraceNode* recording_ = nullptr;
  std::vector<Before> before_;
};

}  // namespace regraft
