// Memory that something outside of torch may read or write at any time, as numpy arrays do.
#pragma once
#include <ATen/ops/from_blob.h>

#include <mutex>
#include <unordered_map>

#include "placeholder.h"

namespace regraft {

class Foreign {
 public:
  static bool holds(const at::Tensor& tensor) {
    static const auto deleter = [] {
      static float memory;
      return at::from_blob(&memory, {1}, [](void*) {}).storage().data_ptr().get_deleter();
    }();
    if (!tensor.has_storage()) return false;
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    if (storage->data_ptr().get_deleter() == deleter) return true;
    if (count_.load(std::memory_order_relaxed) == 0) return false;
    std::lock_guard<std::mutex> guard(mutex_);
    return escaped().count(storage);
  }

  // The storage's address was handed out; a number to take that back by.
  static const void* escape(const at::Tensor& tensor) {
    if (!tensor.has_storage()) return nullptr;
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    std::lock_guard<std::mutex> guard(mutex_);
    auto [place, fresh] = escaped().try_emplace(storage, tensor.storage().getWeakStorageImpl(), 0);
    ++place->second.second;
    count_ = escaped().size();
    return storage;
  }

  static void give_back(const void* storage) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto place = escaped().find(storage);
    if (place == escaped().end() || --place->second.second > 0) return;
    escaped().erase(place);
    count_ = escaped().size();
  }

  // Drops storages that are gone.
  static void tidy() {
    if (count_ < 64) return;
    std::lock_guard<std::mutex> guard(mutex_);
    for (auto place = escaped().begin(); place != escaped().end();)
      place = place->second.first.use_count() == 0 ? escaped().erase(place) : std::next(place);
    count_ = escaped().size();
  }

 private:
  using Escaped =
      std::unordered_map<const void*, std::pair<c10::weak_intrusive_ptr<c10::StorageImpl>, int>>;
  static Escaped& escaped() {
    static auto& storages = *new Escaped();
    return storages;
  }
  inline static std::mutex mutex_;
  inline static std::atomic<size_t> count_{0};
};

}  // namespace regraft
