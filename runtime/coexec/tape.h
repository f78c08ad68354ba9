// Operators put off by the Python side, run in order by whoever is free.
#pragma once
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/stack.h>
#include <c10/core/AutogradState.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "traces.h"

namespace regraft {

inline int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Backward {
  std::vector<at::Tensor> roots, seeds, leaves, sums;  // sums: .grad to add to, or undefined
  bool keep_graph;
};

struct Entry {
  Memo* memo = nullptr;
  TraceNode* node = nullptr;  // null where the graph is full
  bool grad = false;
  std::vector<c10::IValue> args;
  std::vector<c10::intrusive_ptr<PlaceholderImpl>> outs;  // null where the result is an argument
  std::unique_ptr<Backward> backward;
  std::vector<at::Tensor> old;  // what placeholders were before; readers may still look at it
  bool ran = false;
};

class Mispredicted : public std::runtime_error {
 public:
  Mispredicted(const Entry& entry, const std::string& what)
      : runtime_error("regraft: co-execution foresaw another result of " +
                      (entry.memo ? entry.memo->info->name : "a backward pass") + ": " + what +
                      "; run this function without regraft.coexecute") {}
};

// The thread's settings as at its start, whatever it is in the midst of.
class Plain {
  c10::impl::ForceDispatchKeyGuard keys_{c10::default_included_set, c10::default_excluded_set};
  c10::AutogradState autograd_ = c10::AutogradState::get_tls_state();
  at::impl::SavedTensorDefaultHooksTLS hooks_ = at::SavedTensorDefaultHooks::get_tls_state();

 public:
  Plain() {
    // without threads of its own: what a backward pass calls is to find this one at work
    c10::AutogradState::set_tls_state({true, false, true, false});
    at::SavedTensorDefaultHooks::set_tls_state({});
  }
  ~Plain() {
    c10::AutogradState::set_tls_state(autograd_);
    at::SavedTensorDefaultHooks::set_tls_state(std::move(hooks_));
  }
};

class Tape {
 public:
  static constexpr size_t CHUNK = 48, FEW = 8, LONGEST = 4096;  // FEW: worth no sleep
  std::atomic<int64_t> executed_here{0}, executed_aside{0}, aside_ns{0};
  std::atomic<bool> stay_here{false};  // no other thread is ever to run entries
  std::atomic<bool> aside{false};      // another thread is to run entries now
  std::exception_ptr error;
  std::string failed;
  std::function<void()> before_drain;

  void push(Entry&& entry) {
    size_t waiting;
    {
      std::lock_guard<std::mutex> guard(queue_mutex_);
      queue_.push_back(std::move(entry));
      waiting = queue_.size();
    }
    unfinished_.fetch_add(1, std::memory_order_relaxed);
    if (helps() && waiting >= CHUNK && waiting % 16 == 0) wake();
  }

  // The last entry is still here and made `placeholder`: gives its result to `other`.
  bool hand_over(const PlaceholderImpl* placeholder, c10::intrusive_ptr<PlaceholderImpl> other) {
    std::lock_guard<std::mutex> guard(queue_mutex_);
    if (queue_.empty() || queue_.back().outs.size() != 1 || queue_.back().args.empty()) return false;
    auto& out = queue_.back().outs[0];
    if (out.get() != placeholder || !queue_.back().memo->info->factory) return false;
    queue_.back().old.push_back(at::Tensor(std::move(out)));
    out = std::move(other);
    return true;
  }

  bool helps() const { return aside && !stay_here; }
  bool idle() const { return unfinished_.load(std::memory_order_acquire) == 0; }
  size_t waiting() const { return unfinished_.load(std::memory_order_relaxed); }

  // Runs some of what is on the tape; false where that is nothing.
  bool drain_some() {
    TORCH_CHECK(!running_here(), "the tape was asked to run by an operator that it runs");
    Plain plain;
    std::lock_guard<std::mutex> guard(run_mutex_);
    if (before_drain) before_drain();
    return run_some(executed_here, 0);
  }

  // f(entries) unless another thread runs them.
  template <typename F>
  void look(F&& f) {
    std::unique_lock<std::mutex> guard(run_mutex_, std::try_to_lock);
    if (!guard) return;
    std::lock_guard<std::mutex> locked(queue_mutex_);
    f(queue_);
  }

  // Runs everything on the tape. The caller does not hold the GIL.
  void drain() {
    TORCH_CHECK(!running_here(), "the tape was asked to run by an operator that it runs");
    Plain plain;
    std::lock_guard<std::mutex> guard(run_mutex_);
    if (before_drain) before_drain();
    while (run_some(executed_here, 0)) {}
  }

  // Runs everything on the tape by `run(entries)`, on the caller's thread, which holds the GIL.
  template <typename F>
  void drain_by(F&& run) {
    TORCH_CHECK(!running_here(), "the tape was asked to run by an operator that it runs");
    std::unique_lock<std::mutex> guard(run_mutex_, std::defer_lock);
    {
      pybind11::gil_scoped_release unlocked;
      guard.lock();
    }
    std::vector<Entry> batch;
    {
      std::lock_guard<std::mutex> locked(queue_mutex_);
      std::move(queue_.begin(), queue_.end(), std::back_inserter(batch));
      queue_.clear();
    }
    struct Finish {
      Tape& tape;
      std::vector<Entry>& batch;
      Plain plain;
      ~Finish() {
        running_here() = false;
        tape.executed_here += batch.size();
        tape.finish(std::move(batch));
      }
    } finish{*this, batch};
    running_here() = true;
    run(batch);
  }

  // Finished entries. The caller holds the GIL when they are destroyed.
  std::vector<Entry> take_done() {
    std::lock_guard<std::mutex> guard(queue_mutex_);
    return std::move(done_);
  }
  size_t done() {
    std::lock_guard<std::mutex> guard(queue_mutex_);
    return done_.size();
  }

  void stop_worker() {
    {
      std::lock_guard<std::mutex> guard(wake_mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    if (worker_.joinable()) worker_.join();
    stop_ = false;
  }

  // Around a fork no other thread is in the midst of anything here; the child has no worker.
  void before_fork() {
    drain();
    run_mutex_.lock(), queue_mutex_.lock(), wake_mutex_.lock();
  }
  void after_fork_in_parent() { wake_mutex_.unlock(), queue_mutex_.unlock(), run_mutex_.unlock(); }
  void after_fork_in_child() {
    for (auto* mutex : {&run_mutex_, &queue_mutex_, &wake_mutex_}) new (mutex) std::mutex();
    new (&wake_) std::condition_variable();
    new (&worker_) std::thread();
    asleep_ = false;
  }

 private:
  void wake() {
    std::unique_lock<std::mutex> guard(wake_mutex_);
    if (!worker_.joinable()) worker_ = std::thread([this] { work(); });
    if (asleep_) guard.unlock(), wake_.notify_one();
  }

  void work() {
    at::init_num_threads();  // OpenMP's number of threads is each thread's own
    for (;;) {
      {
        std::unique_lock<std::mutex> guard(wake_mutex_);
        asleep_ = true;
        wake_.wait(guard, [this] { return stop_ || (helps() && waiting() >= CHUNK); });
        asleep_ = false;
        if (stop_) return;
      }
      std::lock_guard<std::mutex> guard(run_mutex_);
      const auto start = now();
      while (helps() && waiting() >= FEW && run_some(executed_aside, 1)) {}
      aside_ns += now() - start;
    }
  }

  // The worker leaves the last entry, which torch may still be making a copy of.
  bool run_some(std::atomic<int64_t>& counter, size_t left) {
    std::vector<Entry> batch;
    {
      std::lock_guard<std::mutex> guard(queue_mutex_);
      const auto count = std::min(queue_.size() - std::min(queue_.size(), left), CHUNK);
      for (size_t i = 0; i < count; ++i) batch.push_back(std::move(queue_[i]));
      queue_.erase(queue_.begin(), queue_.begin() + count);
    }
    if (batch.empty()) return false;
    running_here() = true;
    for (auto& entry : batch) run_or_fail(entry);
    running_here() = false;
    counter += batch.size();
    finish(std::move(batch));
    return true;
  }

  void finish(std::vector<Entry>&& batch) {
    const auto count = batch.size();
    {
      std::lock_guard<std::mutex> guard(queue_mutex_);
      std::move(batch.begin(), batch.end(), std::back_inserter(done_));
    }
    unfinished_.fetch_sub(count, std::memory_order_release);
  }

 public:
  static bool& running_here() {
    thread_local bool running = false;
    return running;
  }

  void run_or_fail(Entry& entry) {
    if (entry.ran) return;
    entry.ran = true;
    if (!error) {
      try {
        entry.backward ? run_backward(entry) : run(entry);
        return;
      } catch (...) {
        error = std::current_exception();
        failed = entry.memo ? entry.memo->info->name : "backward";
        if (entry.memo) entry.memo->barrier = true;
      }
    }
    for (auto& out : entry.outs)
      if (out && out->pending) out->failed = true;
  }

  void fail(const std::string& what) {
    error = std::current_exception();
    failed = what;
  }

  static void fill(Entry& entry, PlaceholderImpl* out, at::Tensor made, bool grad) {
    auto* impl = made.unsafeGetTensorImpl();
    const char* what = impl->sizes() != out->sizes() ? "sizes"
        : impl->strides() != out->strides()          ? "strides"
        : impl->dtype() != out->dtype()              ? "type"
        : impl->key_set() != out->key_set().remove(PENDING) ? "dispatch keys"
        : impl->requires_grad() != grad                     ? "requires_grad"
        : typeid(*impl) != typeid(c10::TensorImpl)          ? "kind"
        : made.use_count() != 1                             ? "owners"
                                                            : nullptr;
    if (what) throw Mispredicted(entry, std::string(what) + " of a result differ");
    out->become(impl);
    entry.old.push_back(std::move(made));
  }

 private:
  static void run(Entry& entry) {
    c10::AutoGradMode mode(entry.grad);
    torch::jit::Stack stack(entry.args);
    entry.memo->op.callBoxed(&stack);
    size_t at = 0;
    auto take = [&](c10::IValue&& value) {
      const auto& spec = entry.memo->outs[at];
      auto& out = entry.outs[at++];
      at::Tensor made = std::move(value).toTensor();
      value = c10::IValue();
      if (made.defined() == spec.undefined)
        throw Mispredicted(entry, "it is defined, or is not");
      if (out) fill(entry, out.get(), std::move(made), spec.grad);
      else if (made.defined() && !is_argument(entry, spec.alias, made))
        throw Mispredicted(entry, "it is no longer an argument");
    };
    for (size_t i = 0; i < stack.size(); ++i) {
      if (entry.memo->returns[i] < 0) {
        take(std::move(stack[i]));
        continue;
      }
      auto tensors = stack[i].toTensorVector();
      stack[i] = c10::IValue();
      if (tensors.size() != static_cast<size_t>(entry.memo->returns[i]))
        throw Mispredicted(entry, "the length of a list differs");
      for (auto& tensor : tensors) take(c10::IValue(std::move(tensor)));
    }
  }

  static bool is_argument(const Entry& entry, int32_t wanted, const at::Tensor& made) {
    int32_t seen = 0;
    for (const auto& value : entry.args) {
      if (value.isTensor()) {
        if (seen++ == wanted) return value.toTensor().is_same(made);
      } else if (value.isList()) {
        for (const auto& item : value.toListRef())
          if (item.isTensor() && seen++ == wanted) return item.toTensor().is_same(made);
      }
    }
    return false;
  }

  // Gradients are captured and put where eager's accumulation would have put them.
  static void run_backward(Entry& entry) {
    namespace autograd = torch::autograd;
    auto& job = *entry.backward;
    autograd::edge_list roots, leaves;
    for (const auto& root : job.roots) roots.push_back(autograd::impl::gradient_edge(root));
    for (const auto& leaf : job.leaves) leaves.push_back(autograd::impl::gradient_edge(leaf));
    auto found = autograd::Engine::get_default_engine().execute(
        roots, job.seeds, job.keep_graph, false, false, leaves);
    c10::AutoGradMode mode(false);
    for (size_t i = 0; i < found.size(); ++i) {
      auto& grad = found[i];
      if (!grad.defined()) throw Mispredicted(entry, "a leaf has no gradient");
      if (job.sums[i].defined()) {
        job.sums[i].add_(grad);
        continue;
      }
      auto* out = entry.outs[i].get();
      if (grad.strides() != out->strides() || grad.use_count() != 1 ||
          grad.storage().use_count() != 1 || grad.requires_grad() ||
          grad.unsafeGetTensorImpl()->storage().nbytes() != grad.nbytes()) {
        auto own = at::empty_strided(out->sizes(), out->strides(), grad.options());
        own.copy_(grad);
        grad = std::move(own);
      }
      fill(entry, out, std::move(grad), false);
    }
  }

  std::mutex queue_mutex_, run_mutex_, wake_mutex_;
  std::condition_variable wake_;
  std::deque<Entry> queue_;
  std::vector<Entry> done_;
  std::atomic<size_t> unfinished_{0};
  std::thread worker_;
  bool asleep_ = false, stop_ = false;
};

}  // namespace regraft
