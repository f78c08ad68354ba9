// What the runtime knows of an operator from its schema, and of tensors' metadata.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/flat_hash_map.h>

#include <deque>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "placeholder.h"

namespace regraft {

enum class Kind : uint8_t {
  Defer,    // put on the tape once its results' metadata are known
  Read,     // runs at once, after the tape where an argument depends on it
  Barrier,  // runs at once, after the whole tape
  Pass,     // looks at no data: runs at once
};

struct OpInfo {
  Kind kind = Kind::Defer;
  bool random = false;
  bool masks = false;            // results' sizes depend on data where an argument is a mask
  bool has_tensors = false;
  bool factory = false;          // makes a tensor of numbers, or as large as another
  bool functional = true;        // writes and returns no argument
  uint64_t id = 0;
  int index = -1;                // the argument that says which part of a tensor is meant
  std::vector<bool> value_free;  // a number that no metadata depend on
  std::vector<bool> aliased;     // may be written, or be part of the result
  std::vector<bool> written;
  std::string name;
};

inline bool holds_tensors(const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::TensorType: return true;
    case c10::TypeKind::ListType: return holds_tensors(*type.containedType(0));
    case c10::TypeKind::OptionalType: return holds_tensors(*type.containedType(0));
    default: return false;
  }
}

inline bool is_number(const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::NumberType:
    case c10::TypeKind::FloatType: return true;
    case c10::TypeKind::OptionalType: return is_number(*type.containedType(0));
    case c10::TypeKind::ListType:
      return type.containedType(0)->kind() == c10::TypeKind::NumberType;
    default: return false;
  }
}

inline Kind kind_of(const c10::OperatorHandle& op, const OpInfo& info) {
  static const auto& passes = *new std::unordered_set<std::string>{
      "aten::is_floating_point", "aten::is_complex", "aten::is_signed", "aten::is_same_size",
      "aten::is_conj", "aten::is_neg", "aten::_is_zerotensor", "aten::is_inference",
      "aten::_has_compatible_shallow_copy_type", "aten::size", "aten::stride", "aten::sym_size",
      "aten::sym_stride", "aten::sym_numel", "aten::numel", "aten::dim", "aten::result_type",
      "aten::lift_fresh", "aten::can_cast", "aten::_nested_tensor_size"};
  static const auto& reads = *new std::unordered_set<std::string>{
      "aten::where", "aten::argwhere", "aten::nonzero", "aten::nonzero_numpy",
      "aten::masked_select", "aten::repeat_interleave", "aten::unique_consecutive",
      "aten::unique_dim", "aten::_unique", "aten::_unique2", "aten::unique_dim_consecutive",
      "aten::bincount", "aten::one_hot", "aten::tensor_split", "aten::_pad_packed_sequence",
      "aten::_pack_padded_sequence", "aten::istft", "aten::linalg_lstsq", "aten::to_sparse",
      "aten::_to_sparse", "aten::combinations", "aten::segment_reduce", "aten::ctc_loss",
      "aten::_ctc_loss", "aten::narrow", "aten::_histogramdd_bin_edges", "aten::histogramdd",
      "aten::linalg_matrix_rank", "aten::item", "aten::_local_scalar_dense"};
  static const auto& barriers = *new std::unordered_set<std::string>{
      "aten::set_", "aten::set_data", "aten::requires_grad_", "aten::retain_grad", "aten::data",
      "aten::_backward", "aten::_make_dual", "aten::_fw_primal", "aten::_unpack_dual",
      "aten::resize_", "aten::resize_as_", "aten::rename", "aten::rename_", "aten::refine_names",
      "aten::align_to", "aten::align_as", "aten::align_tensors", "aten::pin_memory",
      "aten::_pin_memory", "aten::_version", "aten::is_leaf", "aten::output_nr", "aten::_lazy_clone",
      "aten::to_mkldnn", "aten::record_stream", "aten::_conj_physical", "aten::detach_"};
  const auto& schema = op.schema();
  const auto& name = schema.name();
  if (passes.count(name) || name.rfind("profiler::", 0) == 0) return Kind::Pass;
  if (name.rfind("aten::", 0) != 0 || barriers.count(name)) return Kind::Barrier;
  if (!info.has_tensors && !info.random) return Kind::Pass;
  bool writes = false, plain = true;
  for (const auto& argument : schema.arguments()) {
    if (!argument.alias_info() || !argument.alias_info()->isWrite()) continue;
    writes = true;
    if (argument.kwarg_only()) return Kind::Barrier;  // out=
  }
  for (const auto& result : schema.returns()) plain &= holds_tensors(*result.type());
  if (op.hasTag(at::Tag::inplace_view)) return Kind::Barrier;
  if (!plain) return writes || info.random ? Kind::Barrier : Kind::Read;
  if (schema.returns().empty() && !writes) return Kind::Barrier;
  if (info.masks) return Kind::Defer;
  const bool dynamic = op.hasTag(at::Tag::dynamic_output_shape) ||
      op.hasTag(at::Tag::data_dependent_output) || reads.count(name);
  if (name == "aten::where" || name == "aten::narrow" || name == "aten::repeat_interleave") {
    // overloads with given sizes are plain
    const auto& overload = schema.overload_name();
    const bool reading = name == "aten::where" ? schema.arguments().size() == 1
                                               : overload == "Tensor" || overload == "self_Tensor";
    return reading ? Kind::Read : Kind::Defer;
  }
  return dynamic ? (writes || info.random ? Kind::Barrier : Kind::Read) : Kind::Defer;
}

inline const OpInfo& info_of(const c10::OperatorHandle& op) {
  thread_local auto& known = *new ska::flat_hash_map<const void*, std::unique_ptr<OpInfo>>();
  const auto& schema = op.schema();
  auto& found = known[&schema];
  if (found) return *found;
  auto info = std::make_unique<OpInfo>();
  info->id = reinterpret_cast<uint64_t>(&schema);
  info->name = schema.name();
  info->random = op.hasTag(at::Tag::nondeterministic_seeded);
  info->masks = info->name.rfind("aten::index", 0) == 0 || info->name == "aten::_unsafe_index";
  // these write running statistics that their schema does not name
  const bool statistics = info->name.find("batch_norm") != std::string::npos ||
      info->name.find("instance_norm") != std::string::npos;
  for (const auto& argument : schema.arguments()) {
    const auto* alias = argument.alias_info();
    info->value_free.push_back(is_number(*argument.type()));
    info->aliased.push_back(alias || statistics);
    info->functional &= !info->aliased.back();
    info->written.push_back(alias && alias->isWrite());
    info->has_tensors |= holds_tensors(*argument.type());
  }
  info->kind = kind_of(op, *info);
  info->factory = !info->has_tensors || info->name.ends_with("_like");
  if (info->name == "aten::select" && schema.overload_name() == "int") info->index = 2;
  return *(found = std::move(info));
}

inline bool has_backend(c10::Device device) { return device.is_cpu() || device.is_cuda(); }

// Sizes, strides, type, device and dispatch keys, interned: equal ones have one number.
struct Meta {
  std::vector<int64_t> sizes, strides;
  caffe2::TypeMeta dtype;
  c10::Device device;
  c10::DispatchKeySet keys;
  bool wrapped;

  bool matches(const c10::TensorImpl* impl) const {
    return impl->dtype() == dtype && impl->device() == device && impl->key_set().remove(PENDING) == keys &&
        impl->is_wrapped_number() == wrapped && impl->sizes() == c10::IntArrayRef(sizes) &&
        impl->strides() == c10::IntArrayRef(strides);
  }
};

struct Words {
  size_t operator()(const std::vector<uint64_t>& words) const {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (uint64_t word : words) hash = (hash ^ word) * 0x9E3779B97F4A7C15ull, hash ^= hash >> 29;
    return hash;
  }
};

class Metas {
 public:
  uint32_t intern(const c10::TensorImpl* impl) {
    words_.clear();
    words_.push_back(impl->key_set().remove(PENDING).raw_repr());
    words_.push_back(static_cast<uint64_t>(c10::typeMetaToScalarType(impl->dtype())) |
                     static_cast<uint64_t>(impl->is_wrapped_number()) << 16 |
                     static_cast<uint64_t>(impl->device().type()) << 24 |
                     static_cast<uint64_t>(impl->device().index() + 1) << 32);
    words_.push_back(impl->dim());
    for (auto size : impl->sizes()) words_.push_back(size);
    for (auto stride : impl->strides()) words_.push_back(stride);
    auto [place, fresh] = numbers_.try_emplace(words_, metas_.size());
    if (fresh)
      metas_.push_back({impl->sizes().vec(), impl->strides().vec(), impl->dtype(), impl->device(),
                        impl->key_set().remove(PENDING), impl->is_wrapped_number()});
    return place->second;
  }
  const Meta& operator[](uint32_t number) const { return metas_[number]; }

 private:
  std::unordered_map<std::vector<uint64_t>, uint32_t, Words> numbers_;
  std::deque<Meta> metas_;
  std::vector<uint64_t> words_;
};

}  // namespace regraft
