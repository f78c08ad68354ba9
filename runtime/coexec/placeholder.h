// A tensor whose value an operator on the tape will give: the right metadata, no data yet.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <map>

namespace regraft {

// Above autograd and every mode: what a thread under co-execution dispatches to first.
constexpr auto MODE = c10::DispatchKey::TESTING_ONLY_GenericMode;
// In the key set of pending placeholders: whoever else dispatches on one materialises it first.
constexpr auto PENDING = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

class Engine;

// The way to TensorImpl's private autograd metadata, which a result hands over to its placeholder.
struct AutogradSlot {
  using type = std::unique_ptr<c10::AutogradMetaInterface> c10::TensorImpl::*;
  friend type member(AutogradSlot);
};
template <typename Tag, typename Tag::type Member>
struct Opened {
  friend typename Tag::type member(Tag) { return Member; }
};
template struct Opened<AutogradSlot, &c10::TensorImpl::autograd_meta_>;

// A storage without memory, shared by all pending placeholders of a device: reading it raises.
inline c10::Storage& no_storage(c10::Device device) {
  thread_local auto& storages = *new std::map<std::pair<int, int>, c10::Storage>();
  auto [place, fresh] = storages.try_emplace({static_cast<int>(device.type()), device.index()});
  if (fresh)
    place->second = c10::Storage(
        c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, device), nullptr, false);
  return place->second;
}

class PlaceholderImpl final : public c10::TensorImpl {
 public:
  PlaceholderImpl(
      c10::DispatchKeySet keys, caffe2::TypeMeta dtype, c10::Device device,
      c10::IntArrayRef sizes, c10::IntArrayRef strides, bool wrapped, Engine* owner)
      : TensorImpl(c10::Storage(no_storage(device)), keys.add(PENDING), dtype), engine(owner) {
    set_sizes_and_strides(sizes, strides);
    if (wrapped) set_wrapped_number(true);
  }

  // Becomes what `made` is; `made` is left with what this was and must outlive concurrent readers.
  void become(c10::TensorImpl* made) {
    const auto meta = member(AutogradSlot());
    const bool wanted = requires_grad();
    if (made->*meta) {
      std::swap(this->*meta, made->*meta);
      auto* old = (made->*meta).get();
      if (wanted && !requires_grad()) set_requires_grad(true);
      if (old && old->grad().defined()) mutable_grad() = old->grad();
    }
    const auto storage = &PlaceholderImpl::storage_;
    std::swap(this->*storage, made->*storage);
    storage_offset_ = made->storage_offset();
    set_version_counter(made->version_counter());
    key_set_ = made->key_set();
    set_allow_tensor_metadata_change(made->allow_tensor_metadata_change());
    pending.store(false, std::memory_order_release);
  }

  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version, bool allow_change) const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version, bool allow_change) const override;

  std::atomic<bool> pending{true};
  bool failed = false;          // its operator raised: it never gets a value
  bool predicted_grad = false;  // requires_grad as predicted; the live flag may be set by Python
  uint32_t meta = 0;
  int32_t slot = -1;
  uint64_t epoch = 0;
  Engine* engine;
};

inline PlaceholderImpl* as_placeholder(c10::TensorImpl* impl) {
  return typeid(*impl) == typeid(PlaceholderImpl) ? static_cast<PlaceholderImpl*>(impl) : nullptr;
}

inline PlaceholderImpl* as_pending(const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  auto* placeholder = as_placeholder(tensor.unsafeGetTensorImpl());
  return placeholder && placeholder->pending.load(std::memory_order_acquire) ? placeholder : nullptr;
}

}  // namespace regraft
