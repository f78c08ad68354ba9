// What a thread under co-execution dispatches to first.
#pragma once
#include <torch/csrc/python_headers.h>

#include <frameobject.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/SavedTensorHooks.h>

#include "engine_inl.h"

namespace regraft {

using Stack = torch::jit::Stack;

inline std::string& own_folder() {
  static auto& folder = *new std::string();
  return folder;
}

// The nearest line of Python outside of torch and this runtime.
static std::string python_line() {
  py::gil_scoped_acquire locked;
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(frame);
  std::string found = "?";
  while (frame) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const char* file = PyUnicode_AsUTF8(code->co_filename);
    const std::string path = file ? file : "?";
    if (path.find("/torch/") == std::string::npos &&
        path.rfind(own_folder(), 0) != 0) {
      found = path + ":" + std::to_string(PyFrame_GetLineNumber(frame));
      Py_DECREF(code), Py_DECREF(frame);
      return found;
    }
    PyFrameObject* back = PyFrame_GetBack(frame);
    Py_DECREF(code), Py_DECREF(frame);
    frame = back;
  }
  PyErr_Clear();
  return found;
}

// Python waits for a value here.
static void fetch(Engine& engine) {
  if (engine.tape.idle()) return engine.flush();
  auto& place = engine.fetches[python_line()];
  const auto start = now();
  engine.flush();
  ++place.count, place.ns += now() - start;
  if (!engine.anchored) engine.restart_path();
}

enum class Setting { Usual, Factory, Other };

// Whether operators run here as they would later on the tape.
static Setting setting() {
  static const auto usual = c10::default_included_set.add(MODE);
  const auto local = c10::impl::tls_local_dispatch_key_set();
  if (local.included_ != usual || torch::autograd::AnomalyMode::is_enabled()) return Setting::Other;
  if (c10::GradMode::is_enabled() && at::SavedTensorDefaultHooks::get_hooks()) return Setting::Other;
  if (local.excluded_ == c10::default_excluded_set) return Setting::Usual;
  const auto rest = local.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return rest == c10::default_excluded_set ? Setting::Factory : Setting::Other;
}

static void run_at_once(const c10::OperatorHandle& op, Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard guard(MODE);
  op.callBoxed(stack);
}

// Runs an operator that cannot be put off, with all its arguments there. `named` says that it is
// part of the path; gradients through others are not told by the path.
static void barrier(Engine& engine, const c10::OperatorHandle& op, Stack* stack, Memo* named) {
  const auto count = op.schema().arguments().size();
  const auto* args = stack->data() + stack->size() - count;
  bool grad = false;
  each_tensor(args, count, [&](const at::Tensor& t, size_t) {
    grad |= t.defined() && t.requires_grad();
    engine.touch(t);
  });
  run_at_once(op, stack);
  ++engine.at_once;
  const auto results = op.schema().returns().size();
  bool tensors = op.schema().is_mutable();
  each_tensor(stack->data() + stack->size() - results, results,
              [&](const at::Tensor& t, size_t) { tensors = true, engine.touch(t); });
  if (!named && grad && tensors && c10::GradMode::is_enabled()) engine.taint();
  if (named) {
    engine.advance(named);
    each_tensor(stack->data() + stack->size() - results, results,
                [&](const at::Tensor& t, size_t) { engine.name(t); });
  }
}

// Unknown for these arguments: runs at once, and what it gave is learned.
static void learn(Engine& engine, const c10::OperatorHandle& op, const OpInfo& info, Stack* stack) {
  engine.flush();
  const auto count = op.schema().arguments().size();
  const auto* args = stack->data() + stack->size() - count;
  // the arguments outlive the call, so that results can be compared with them
  const Stack kept(args, args + count);
  const auto key = engine.key;
  const auto wiring = engine.wiring;
  std::vector<bool> grads;
  bool masked = false;
  each_tensor(kept.data(), count, [&](const at::Tensor& t, size_t argument) {
    if (info.written[argument]) grads.push_back(t.defined() && t.requires_grad());
    masked |= info.masks && argument > 0 && t.defined() &&
        (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
  });
  run_at_once(op, stack);
  ++engine.recorded;
  bool changed = masked;
  size_t at = 0;
  each_tensor(kept.data(), count, [&](const at::Tensor& t, size_t argument) {
    if (info.written[argument]) changed |= grads[at++] != (t.defined() && t.requires_grad());
  });
  const auto results = op.schema().returns().size();
  c10::ArrayRef<c10::IValue> made(stack->data() + stack->size() - results, results);
  engine.key = key, engine.wiring = wiring;
  std::vector<const c10::TensorImpl*> impls;
  each_tensor(kept.data(), count, [&](const at::Tensor& t, size_t) {
    impls.push_back(t.defined() ? t.unsafeGetTensorImpl() : nullptr);
  });
  std::vector<bool> known;
  for (const auto& value : made) {
    if (value.isTensor()) known.push_back(engine.is_known(value.toTensor()));
    else for (const auto& item : value.toListRef()) known.push_back(engine.is_known(item.toTensor()));
  }
  auto* memo = engine.learn(op, info, changed, impls, known, made);
  engine.advance(memo);
  each_tensor(made.data(), results, [&](const at::Tensor& t, size_t) { engine.name(t); });
}

// A few numbers of the program's own, an optimiser's step count: computed at once, so that reading
// them waits for nothing.
static bool runs_on_host(const Engine& engine, const OpInfo& info, const c10::IValue* args,
                         size_t count) {
  if (info.random) return false;
  bool any = false;
  auto fits = [&](const at::Tensor& t) {
    any = true;
    return t.defined() && t.dim() == 0 && t.is_cpu() && !t.requires_grad() && !engine.on_path(t);
  };
  for (size_t i = 0; i < count; ++i) {
    if (args[i].isTensor() && !fits(args[i].toTensor())) return false;
    if (!args[i].isList()) continue;
    for (const auto& item : args[i].toListRef())
      if (item.isTensor() && !fits(item.toTensor())) return false;
  }
  return any;
}

static void put_off(Engine& engine, Memo* memo, Stack* stack, bool grad) {
  const auto count = memo->op.schema().arguments().size();
  Entry entry;
  entry.memo = memo;
  entry.grad = grad;
  std::vector<c10::IValue> results;
  size_t at = 0;
  auto next = [&]() -> at::Tensor {
    const auto& spec = memo->outs[at++];
    entry.outs.emplace_back();
    if (spec.undefined) return {};
    if (spec.alias >= 0) return *engine.tensors[spec.alias];
    entry.outs.back() = engine.placeholder(spec.meta, spec.grad);
    return at::Tensor(c10::intrusive_ptr<c10::TensorImpl>(entry.outs.back()));
  };
  entry.node = engine.advance(memo);
  for (int length : memo->returns) {
    if (length < 0) {
      results.emplace_back(next());
      continue;
    }
    c10::List<at::Tensor> list;
    for (int i = 0; i < length; ++i) list.push_back(next());
    results.emplace_back(std::move(list));
  }
  const auto first = stack->end() - count;
  entry.args.assign(std::make_move_iterator(first), std::make_move_iterator(stack->end()));
  stack->erase(first, stack->end());
  for (auto& result : results) stack->push_back(std::move(result));
  ++engine.deferred;
  engine.put_off(std::move(entry));
}

// Arguments in foreign memory are copied for the tape; false where the operator may hold on to one.
static bool copy_foreign(Engine& engine, const OpInfo& info, const Memo& memo, Stack* stack) {
  bool any = false;
  for (size_t i = 0; i < engine.tensors.size(); ++i) {
    const auto& t = *engine.tensors[i];
    if (!t.defined() || as_pending(t) || !Foreign::holds(t)) continue;
    any = true;
    if (info.aliased[engine.argument_of[i]] || t.requires_grad() ||
        !t.is_non_overlapping_and_dense())
      return false;
    for (const auto& out : memo.outs)
      if (out.alias == static_cast<int32_t>(i)) return false;
  }
  if (!any) return true;
  c10::impl::ExcludeDispatchKeyGuard guard(MODE);
  const auto count = memo.op.schema().arguments().size();
  for (auto* value = stack->data() + stack->size() - count; value != stack->data() + stack->size();
       ++value) {
    if (value->isTensor()) {
      const auto t = value->toTensor();
      if (t.defined() && !as_pending(t) && Foreign::holds(t)) *value = t.clone();
    } else if (value->isList()) {
      for (const auto& item : value->toListRef())
        if (item.isTensor() && item.toTensor().defined() && !as_pending(item.toTensor()) &&
            Foreign::holds(item.toTensor()))
          return false;
    }
  }
  return true;
}

static void intercept(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  auto* active = Engine::active();
  if (!active || active->paused) {
    c10::impl::ExcludeDispatchKeyGuard guard(MODE);
    return op.callBoxed(stack);
  }
  auto& engine = *active;
  const auto& info = info_of(op);
  if (info.kind == Kind::Pass) {
    c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet({MODE, PENDING}));
    return op.callBoxed(stack);
  }
  const auto count = op.schema().arguments().size();
  const auto* args = stack->data() + stack->size() - count;
  const auto where = setting();
  if (where == Setting::Other || (where == Setting::Factory && !info.functional)) {
    engine.flush();
    ++engine.reasons["autocast, a mode or hooks in force"];
    return barrier(engine, op, stack, nullptr);
  }
  const bool grad = where == Setting::Usual && c10::GradMode::is_enabled();
  if (info.kind == Kind::Read) {
    bool wait = false;
    each_tensor(args, count, [&](const at::Tensor& t, size_t) { wait |= engine.depends(t); });
    if (wait) fetch(engine);
    return barrier(engine, op, stack, nullptr);
  }
  if (info.kind == Kind::Barrier) {
    fetch(engine);
    ++engine.reasons[info.name];
    return barrier(engine, op, stack, nullptr);
  }
  if (runs_on_host(engine, info, args, count)) {
    ++engine.at_once;
    return run_at_once(op, stack);
  }
  if (const char* why = engine.encode(info, args, count, grad)) {
    engine.flush();
    ++engine.reasons[why];
    return barrier(engine, op, stack, nullptr);
  }
  auto* memo = engine.memo();
  if (!memo) return learn(engine, op, info, stack);
  if (memo->barrier) {
    fetch(engine);
    ++engine.reasons[info.name + ", whose result depends on data"];
    engine.encode(info, args, count, grad);
    return barrier(engine, op, stack, engine.memo());  // the wait may have dropped what was learned
  }
  if (!copy_foreign(engine, info, *memo, stack)) {
    engine.flush();
    ++engine.reasons["memory shared with numpy or others"];
    return barrier(engine, op, stack, nullptr);
  }
  put_off(engine, memo, stack, grad);
}

// An operator elsewhere, or with the interceptor off, was given a placeholder.
static void materialise(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto count = op.schema().arguments().size();
  const Stack args(stack->end() - count, stack->end());
  each_tensor(args.data(), count, [&](const at::Tensor& t, size_t) {
    if (const auto* placeholder = as_pending(t)) Engine::materialise(placeholder);
  });
  op.callBoxed(stack);
}

}  // namespace regraft
