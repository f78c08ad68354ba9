// Waiting for values, and backward passes on the tape.
#pragma once
#include "launch.h"

#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/utils/pybind.h>

namespace regraft {

inline void Engine::flush() {
  if (!tape.idle() || tape.done()) {
    const auto start = now();
    if (compiler && active() == this) {
      py::gil_scoped_acquire locked;
      launch();
    } else {
      std::optional<py::gil_scoped_release> unlocked;
      if (PyGILState_Check()) unlocked.emplace();
      while (tape.drain_some()) collect();  // memory that Python let go of is used again
    }
    collect();
    stall_ns += now() - start;
  }
  if (!tape.error) return;
  auto error = std::exchange(tape.error, nullptr);
  ++reasons["raised: " + tape.failed];
  restart_path();
  std::rethrow_exception(error);
}

inline void Engine::materialise(const PlaceholderImpl* placeholder) {
  if (placeholder->engine == active()) {
    active()->flush();
  } else {
    std::optional<py::gil_scoped_release> unlocked;
    if (PyGILState_Check()) unlocked.emplace();
    placeholder->engine->tape.drain();
  }
  TORCH_CHECK(!placeholder->pending, "regraft: this tensor has no value: its operator raised an "
              "error under co-execution");
}

inline void Engine::collect() {
  py::gil_scoped_acquire locked;
  tape.take_done().clear();
  Foreign::tidy();
}

// Copies of a pending placeholder's metadata would miss its data, so the data come first.
inline c10::intrusive_ptr<PlaceholderImpl> copy_in_advance(const PlaceholderImpl* placeholder) {
  auto* engine = placeholder->engine;
  if (engine == Engine::active()) {
    // torch.randn and its like return a copy of what they were given and drop that
    auto copy = engine->placeholder(placeholder->meta, false, placeholder->slot);
    if (engine->tape.hand_over(placeholder, copy)) return copy;
  }
  Engine::materialise(placeholder);
  return nullptr;
}

inline c10::intrusive_ptr<c10::TensorImpl> PlaceholderImpl::shallow_copy_and_detach(
    const c10::VariableVersion& version, bool allow_change) const {
  if (pending)
    if (auto copy = copy_in_advance(this)) return copy;
  return TensorImpl::shallow_copy_and_detach(version, allow_change);
}

inline c10::intrusive_ptr<c10::TensorImpl> PlaceholderImpl::shallow_copy_and_detach(
    c10::VariableVersion&& version, bool allow_change) const {
  if (pending)
    if (auto copy = copy_in_advance(this)) return copy;
  return TensorImpl::shallow_copy_and_detach(std::move(version), allow_change);
}

// ---- backward passes

inline bool Engine::hooked(const at::Tensor& leaf) const {
  using namespace torch::autograd;
  if (!impl::hooks(leaf).empty() || impl::post_acc_grad_hooks(leaf)) return true;
  auto node = impl::try_get_grad_accumulator(leaf);
  return node && (!node->pre_hooks().empty() || !node->post_hooks().empty() ||
                  !node->tensor_pre_hooks().empty());
}

inline bool plain_grad(const at::Tensor& grad) {
  return typeid(*grad.unsafeGetTensorImpl()) == typeid(c10::TensorImpl) && has_backend(grad.device()) &&
      !grad.requires_grad() && !Foreign::holds(grad);
}

inline Engine::Verdict Engine::begin_backward(const std::vector<at::Tensor>& roots,
                                       const std::vector<at::Tensor>& seeds, bool keep_graph) {
  recording_ = nullptr;
  if (!cursor_ || tainted_ || torch::autograd::AnomalyMode::is_enabled()) return Verdict::Eager;
  key.clear(), tensors.clear(), argument_of.clear(), wiring.clear(), why_ = nullptr;
  for (const auto* list : {&roots, &seeds})
    for (const auto& tensor : *list) encode(tensor, 0);
  wiring.push_back(keep_graph), wiring.push_back(roots.size());
  if (why_ || tainted_) return Verdict::Eager;
  for (size_t i = 0; i < roots.size(); ++i)
    if (wiring[i] < 0 || slots_[wiring[i]].input || !roots[i].requires_grad() ||
        !seeds[i].defined() || seeds[i].requires_grad())
      return Verdict::Eager;
  advance(nullptr);
  if (!cursor_) return Verdict::Eager;
  std::vector<at::Tensor> leaves;
  std::vector<int32_t> numbers;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!slots_[i].input) continue;
    auto impl = slots_[i].tensor.lock();
    if (!impl || !impl->requires_grad()) continue;
    at::Tensor leaf(std::move(impl));
    if (!leaf.is_leaf()) continue;
    if (hooked(leaf)) return Verdict::Eager;
    leaves.push_back(leaf), numbers.push_back(i);
  }
  if (!cursor_->backward_known) {
    before_.clear();
    for (size_t i = 0; i < leaves.size(); ++i) {
      auto grad = leaves[i].grad();
      if (grad.defined() && (as_pending(grad) == nullptr) && !plain_grad(grad) &&
          !as_placeholder(grad.unsafeGetTensorImpl()))
        return Verdict::Eager;
      before_.push_back({numbers[i], leaves[i], grad, 0});
    }
    recording_ = cursor_;
    flush();
    for (auto& item : before_) item.version = item.grad.defined() ? item.grad._version() : 0;
    return Verdict::Record;
  }
  Entry entry;
  entry.node = cursor_;
  entry.backward = std::make_unique<Backward>(Backward{roots, seeds, {}, {}, keep_graph});
  auto& job = *entry.backward;
  const auto& specs = cursor_->backward.grads;
  for (const auto& spec : specs) {
    auto place = std::lower_bound(numbers.begin(), numbers.end(), spec.leaf);
    if (place == numbers.end() || *place != spec.leaf) return Verdict::Eager;
    const auto& leaf = leaves[place - numbers.begin()];
    const auto grad = leaf.grad();
    if (grad.defined() == spec.fresh) return Verdict::Eager;
    if (!spec.fresh) {
      const auto* own = as_placeholder(grad.unsafeGetTensorImpl());
      if (!own && !plain_grad(grad)) return Verdict::Eager;
      if (own && own->pending ? own->engine != this : grad.requires_grad()) return Verdict::Eager;
    }
    job.leaves.push_back(leaf), job.sums.push_back(grad);
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!specs[i].fresh) {
      entry.outs.emplace_back();
      touch(job.sums[i]);
      continue;
    }
    auto made = placeholder(specs[i].meta, false);
    entry.outs.push_back(made);
    job.leaves[i].mutable_grad() = at::Tensor(std::move(made));
  }
  ++backwards;
  put_off(std::move(entry));
  return Verdict::Deferred;
}

// The pass has run at once; what it did to the leaves is learned. Other results are not kept.
inline void Engine::end_backward() {
  ++backwards_eager;
  auto* node = std::exchange(recording_, nullptr);
  auto before = std::exchange(before_, {});
  if (!node || node != cursor_) return;
  BackwardSpec learned;
  for (auto& [slot, leaf, grad, version] : before) {
    auto after = leaf.grad();
    if (!after.defined()) continue;
    const bool fresh = !grad.defined();
    if (!fresh && after.is_same(grad) && grad._version() == version) continue;
    if (!fresh && !after.is_same(grad)) return;
    auto* impl = after.unsafeGetTensorImpl();
    if (fresh && !plain_grad(after)) return;
    learned.grads.push_back({slot, fresh, metas.intern(impl)});
    if (fresh) name(after);
  }
  node->backward = std::move(learned), node->backward_known = true;
}

}  // namespace regraft
