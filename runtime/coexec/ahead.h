// Pieces of a compiled stretch, begun on another thread as soon as Python has called what they
// stand for. What they did is taken back where the program then goes another way.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <functional>

#include "segment.h"

namespace regraft {

class Ahead {
 public:
  std::shared_ptr<Stretch> stretch;  // under way; null: none
  size_t begun = 0;                  // of its pieces
  size_t numbers = 0, given = 0;     // of its entries so far; those that vary
  std::vector<at::Tensor> values;
  bool raised = false;  // a piece did

  // `job` runs on the other thread, after those before it.
  void submit(std::function<void()> job) {
    std::unique_lock<std::mutex> guard(mutex_);
    jobs_.push_back(std::move(job)), ++unfinished_;
    if (!worker_.joinable()) worker_ = std::thread([this] { work(); });
    guard.unlock();
    wake_.notify_one();
  }

  void wait() {
    std::unique_lock<std::mutex> guard(mutex_);
    done_.wait(guard, [this] { return unfinished_ == 0; });
  }

  // What a piece is about to write is kept; on the other thread.
  void keep(const at::Tensor& tensor) { before_.emplace_back(tensor, tensor.clone()); }
  void keep_random() { random_ = at::detail::getDefaultCPUGenerator().get_state(); }

  // The pieces are the program's now.
  void settle() {
    stretch.reset(), values.clear(), before_.clear(), random_ = at::Tensor();
    begun = numbers = given = 0, raised = false;
  }

  // As if nothing had begun.
  void take_back() {
    if (!stretch) return;
    wait();
    c10::NoGradGuard no_grad;
    std::reverse(before_.begin(), before_.end());
    for (auto& [tensor, kept] : before_) tensor.copy_(kept);
    if (random_.defined()) {
      auto generator = at::detail::getDefaultCPUGenerator();
      std::lock_guard<std::mutex> guard(generator.mutex());
      generator.set_state(random_);
    }
    ++stretch->strayed;
    settle();
  }

  void stop_worker() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    if (worker_.joinable()) worker_.join();
    stop_ = false;
  }
  void after_fork_in_child() {
    new (&mutex_) std::mutex();
    new (&wake_) std::condition_variable();
    new (&done_) std::condition_variable();
    new (&worker_) std::thread();
  }

 private:
  void work() {
    at::init_num_threads();
    Plain plain;
    c10::NoGradGuard no_grad;
    std::unique_lock<std::mutex> guard(mutex_);
    for (;;) {
      wake_.wait(guard, [this] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      auto job = std::move(jobs_.front());
      jobs_.pop_front();
      guard.unlock();
      job();
      job = nullptr;
      guard.lock();
      if (--unfinished_ == 0) done_.notify_all();
    }
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> before_;
  at::Tensor random_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<std::function<void()>> jobs_;
  std::thread worker_;
  size_t unfinished_ = 0;
  bool stop_ = false;
};

}  // namespace regraft
