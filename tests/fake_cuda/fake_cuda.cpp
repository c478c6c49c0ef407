// A CUDA device for machines without one: PyTorch's own cuda:0, computed by the CPU in host memory.
//
// Every operator with a CUDA kernel gets one boxed kernel instead (run_on_cpu), which hands the same memory to the
// CPU's kernel as CPU tensors. Device strings, the dispatcher, autocast("cuda") and autograd are therefore PyTorch's
// own, and what CUDA refuses is refused: operands on two devices, norms with weights of another dtype, numpy(). Half
// precision is half precision, too: where the CPU has no kernel for it, inputs are widened and the result is rounded.
//
// The hook is called for whatever makes the host wait for a real device, for copies between the two memories, for
// results in float64 or complex numbers, and for half precision written in place by float32. Memory is counted and can
// be limited.
//
// Built with torch 2.1 and 2.13 (fake_cuda.build).

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_as_complex_cpu_dispatch.h>
#include <ATen/ops/view_as_real_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::ScalarType;

constexpr c10::DeviceType kFake = c10::DeviceType::CUDA;
#define NEWER_THAN(major, minor) \
  (TORCH_VERSION_MAJOR > major || (TORCH_VERSION_MAJOR == major && TORCH_VERSION_MINOR > minor))

Device here() { return Device(kFake, 0); }

// ------------------------------------------------------------------------------------------------------ the watcher

struct Watch {
  std::atomic<bool> on{false}, operators{false};
  PyObject* hook = nullptr;  // hook(kind, operator, bytes)
} watch;

void note(const char* kind, const std::string& op, int64_t bytes) {
  if (!watch.on || watch.hook == nullptr) return;
  pybind11::gil_scoped_acquire gil;
  pybind11::handle(watch.hook)(kind, op, bytes);
}

void note_dtype(ScalarType type) {
  if (type == at::kDouble || c10::isComplexType(type)) note("wide", c10::toString(type), 0);
}

// ------------------------------------------------------------------------------------------------------------- memory

struct Memory {
  std::atomic<int64_t> now{0}, peak{0}, limit{0};

  void take(int64_t size) {
    if (limit > 0 && now + size > limit) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size,
                       " bytes. GPU 0 has a total capacity of ", limit.load(), " bytes of which ",
                       limit - now, " bytes is free.");
    }
    now += size;
    if (now > peak) peak = now.load();
  }
} memory;

// Page-locked host memory, from and to which a copy may go on while the host does something else.
struct Pinned final : c10::Allocator {
  mutable std::mutex lock;
  mutable std::map<const void*, int64_t> sizes;

  bool holds(const void* data) const {
    std::lock_guard<std::mutex> guard(lock);
    auto block = sizes.upper_bound(data);
    if (block == sizes.begin()) return false;
    --block;
    return static_cast<const char*>(data) - static_cast<const char*>(block->first) < block->second;
  }

  static void release(void* data);
#if NEWER_THAN(2, 2)
  c10::DataPtr allocate(size_t size) override {
#else
  c10::DataPtr allocate(size_t size) const override {
#endif
    void* data = c10::alloc_cpu(size);
    std::lock_guard<std::mutex> guard(lock);
    sizes[data] = static_cast<int64_t>(size);
    return {data, data, &release, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
#if NEWER_THAN(2, 2)
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
#endif
} pinned;

void Pinned::release(void* data) {
  std::lock_guard<std::mutex> guard(pinned.lock);
  pinned.sizes.erase(data);
  c10::free_cpu(data);
}

struct Block {  // a device storage owns memory of its own, or the CPU storage that a kernel has made
  void* data;
  int64_t size;
  c10::Storage lent;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  memory.now -= block->size;
  if (block->data != nullptr) c10::free_cpu(block->data);
  delete block;
}

struct FakeAllocator final : c10::Allocator {
#if NEWER_THAN(2, 2)
  c10::DataPtr allocate(size_t size) override {
#else
  c10::DataPtr allocate(size_t size) const override {
#endif
    memory.take(static_cast<int64_t>(size));
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    auto* block = new Block{data, static_cast<int64_t>(size), c10::Storage()};
    return {data, block, &release, here()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
#if NEWER_THAN(2, 2)
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
#endif
} allocator;

// ------------------------------------------------------------------------------------------------------------- device

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kFake; }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, here()); }
};

// Autograd asks these before it starts its threads.
struct FakeHooks final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* data) const override { return pinned.holds(data); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
#if !NEWER_THAN(2, 2)
  void initCUDA() const override {}
#else
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
#endif
};

// -------------------------------------------------------------------------------- one memory as tensors of two devices

Tensor make_tensor(c10::Storage storage, DispatchKey key, caffe2::TypeMeta dtype) {
  return at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), dtype);
}

bool is_ours(const Tensor& t) { return t.defined() && t.device().type() == kFake; }

// A CPU tensor over a device tensor's memory.
Tensor lend(const Tensor& t) {
  auto owner = t.storage();
  auto* keep = new c10::Storage(owner);
  c10::DataPtr data(const_cast<void*>(owner.data()), keep, [](void* p) { delete static_cast<c10::Storage*>(p); },
                    Device(c10::DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  auto result = make_tensor(std::move(storage), DispatchKey::CPU, t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) result.unsafeGetTensorImpl()->_set_conj(true);
  if (t.is_neg()) result.unsafeGetTensorImpl()->_set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) result.unsafeGetTensorImpl()->set_wrapped_number(true);
  return result;
}

// A device tensor over a CPU kernel's result.
Tensor adopt(const Tensor& made) {
  note_dtype(made.scalar_type());
  auto lent = made.storage();
  auto size = static_cast<int64_t>(lent.nbytes());
  memory.take(size);
  auto* block = new Block{nullptr, size, lent};
  c10::DataPtr data(const_cast<void*>(lent.data()), block, &release, here());
  c10::Storage storage(c10::Storage::use_byte_size_t(), lent.nbytes(), std::move(data), &allocator, true);
  auto result = make_tensor(std::move(storage), DispatchKey::CUDA, made.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
  return result;
}

void grow(const Tensor& t, int64_t bytes) {
  auto storage = t.storage();
  if (bytes <= static_cast<int64_t>(storage.nbytes())) return;
  auto data = allocator.allocate(bytes);
  if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(bytes);
}

const Tensor& resize(const Tensor& self, at::IntArrayRef size, c10::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() == size && !format) return self;
  impl->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  grow(self, (impl->storage_offset() + impl->numel()) * static_cast<int64_t>(impl->itemsize()));
  return self;
}

// ------------------------------------------------------------------------------------------------ refusals and waits

[[noreturn]] void refuse_devices() {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
  std::abort();
}

// Operators that take no zero-dimensional CPU tensor beside CUDA's.
const std::unordered_set<std::string> kStrict = {"aten::cat", "aten::stack", "aten::embedding",
                                                 "aten::index_select", "aten::gather", "aten::scatter",
                                                 "aten::mm", "aten::bmm", "aten::addmm"};
// Operators that take indices on the CPU, and wait while these are copied to the device.
const std::unordered_set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                                   "aten::index_put", "aten::_unsafe_index"};
// Operators that wait, since the size of their result is computed on the device.
const std::unordered_set<std::string> kWaiting = {"aten::nonzero", "aten::masked_select", "aten::_unique",
                                                  "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
                                                  "aten::equal", "aten::repeat_interleave", "aten::bincount",
                                                  "aten::multinomial"};
// Norms whose weights must have the features' dtype; the CPU's kernels also take others.
const std::unordered_set<std::string> kNorms = {"aten::native_group_norm", "aten::native_layer_norm",
                                                "aten::native_batch_norm"};

void check_norm(const std::vector<Tensor>& tensors) {
  for (const auto& t : tensors) {
    if (t.scalar_type() != tensors[0].scalar_type()) {
      TORCH_CHECK(false, "expected scalar type ", c10::toString(tensors[0].scalar_type()), " but found ",
                  c10::toString(t.scalar_type()));
    }
  }
}

// ---------------------------------------------------------------------------------------------------- half precision

std::mutex widened_lock;
std::set<std::string> widened;  // operators without a CPU kernel in half precision

bool lacks_half(const std::string& message) {
  return message.find("not implemented for 'Half'") != std::string::npos ||
         message.find("half to float conversion is not supported on CPU") != std::string::npos ||
         message.find("!needs_dynamic_casting") != std::string::npos ||  // the CPU's addcmul does not mix two dtypes
         message.find("fp16") != std::string::npos;
}

// Calls the CPU's kernel with the stack's last arguments, all CPU tensors; widens half precision where it must.
void call_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto first = stack->size() - count;
  std::vector<IValue> arguments(stack->begin() + static_cast<int64_t>(first), stack->end());
  bool has_half = false;
  for (const auto& value : arguments) {
    if (value.isTensor() && value.toTensor().defined()) has_half |= value.toTensor().scalar_type() == at::kHalf;
    if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorList()) has_half |= t.defined() && t.scalar_type() == at::kHalf;
    }
  }
  const auto name = c10::toString(schema.operator_name());
  bool narrow = false;  // the gradient of a softmax that has made float32 of half precision
  for (size_t i = 0; i < count; ++i) {
    narrow |= schema.arguments()[i].name() == "input_dtype" && arguments[i].isInt() &&
              arguments[i].toInt() == static_cast<int64_t>(at::kHalf);
  }
  bool widen = narrow;
  if (has_half && !widen) {
    std::lock_guard<std::mutex> guard(widened_lock);
    widen = widened.count(name) > 0;
  }
  if (!widen) {
    try {
      op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
      return;
    } catch (const c10::Error& error) {
      if (!has_half || !lacks_half(error.what_without_backtrace())) throw;
    }
    std::lock_guard<std::mutex> guard(widened_lock);
    widened.insert(name);
  }
  stack->resize(first);
  std::vector<std::pair<Tensor, Tensor>> written;  // the half tensor, its wide copy
  bool keeps_wide = false;
  for (size_t i = 0; i < count; ++i) {
    const auto& argument = schema.arguments()[i];
    IValue value = arguments[i];
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().scalar_type() == at::kHalf) {
      Tensor half = value.toTensor(), wide = half.to(at::kFloat);
      if (argument.alias_info() && argument.alias_info()->isWrite()) written.emplace_back(half, wide);
      value = wide;
    } else if (value.isTensorList()) {
      c10::List<Tensor> wide;
      for (const Tensor& t : value.toTensorList()) {
        wide.push_back(t.defined() && t.scalar_type() == at::kHalf ? t.to(at::kFloat) : t);
      }
      value = wide;
    } else if (argument.name() == "input_dtype" && narrow) {
      value = static_cast<int64_t>(at::kFloat);
    } else if (argument.name() == "dtype" && value.isInt()) {
      if (value.toInt() == static_cast<int64_t>(at::kHalf)) value = static_cast<int64_t>(at::kFloat);
      else if (value.toInt() == static_cast<int64_t>(at::kFloat)) keeps_wide = true;
    } else if (argument.name() == "half_to_float" && value.isBool() && value.toBool()) {
      value = false;
      keeps_wide = true;
    }
    stack->push_back(value);
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (auto& [half, wide] : written) {
    if (half.sizes() != wide.sizes()) half.resize_(wide.sizes());
    half.copy_(wide);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (!value.isTensor() || !value.toTensor().defined() || value.toTensor().scalar_type() != at::kFloat) continue;
    bool found = false;
    for (auto& [half, wide] : written) {
      if (wide.is_same(value.toTensor())) {
        value = half;
        found = true;
      }
    }
    if (!found && !keeps_wide) value = value.toTensor().to(at::kHalf);
  }
}

// --------------------------------------------------------------------------------------------------- the boxed kernel

struct Lent {
  Tensor ours, face;
};

// Whether an operator in place, such as mul_, computes on half precision with a float32 tensor.
bool writes_half_by_float(const c10::FunctionSchema& schema, const std::vector<Tensor>& given) {
  if (given.empty() || schema.name().back() != '_' || schema.name() == "aten::copy_") return false;
  const auto own = given[0].scalar_type();
  if (own != at::kHalf && own != at::kBFloat16) return false;
  for (const auto& t : given) {
    if (t.scalar_type() == at::kFloat && t.dim() > 0) return true;
  }
  return false;
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  const auto count = schema.arguments().size();
  const auto first = stack->size() - count;
  const bool indexing = kIndexing.count(name) > 0, strict = kStrict.count(name) > 0;
  std::vector<Lent> lent;
  std::vector<Tensor> given;
  int64_t waits_for_indices = 0;
  bool mixed = false;

  auto face_of = [&](const Tensor& t, bool is_index) -> Tensor {
    if (!t.defined()) return t;
    given.push_back(t);
    if (!is_ours(t)) {
      if (is_index) waits_for_indices += static_cast<int64_t>(t.nbytes());
      else if (t.dim() > 0 || strict) mixed = true;
      return t;
    }
    if (is_index && t.scalar_type() == at::kBool) ++waits_for_indices;
    for (const auto& known : lent) {
      if (known.ours.is_same(t)) return known.face;
    }
    lent.push_back({t, lend(t)});
    return lent.back().face;
  };

  for (size_t i = 0; i < count; ++i) {
    IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = face_of(value.toTensor(), false);
    } else if (value.isTensorList()) {
      c10::List<Tensor> faces;
      for (const Tensor& t : value.toTensorList()) faces.push_back(face_of(t, false));
      value = faces;
    } else if (value.isOptionalTensorList()) {
      c10::List<c10::optional<Tensor>> faces;
      for (const c10::optional<Tensor>& t : value.toOptionalTensorList()) {
        faces.push_back(t ? c10::optional<Tensor>(face_of(*t, indexing)) : t);
      }
      value = faces;
    } else if (value.isDevice()) {
      value = Device(c10::DeviceType::CPU);
    }
  }
  if (mixed) {
    if (indexing && !is_ours(given[0])) {
      TORCH_CHECK(false, "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
    }
    refuse_devices();
  }
  if (kNorms.count(name)) check_norm(given);
  if (waits_for_indices) note("index", name, waits_for_indices);
  if (kWaiting.count(name)) note("wait", name, 0);
  if (watch.operators) note("op", name, 0);
  if (writes_half_by_float(schema, given)) note("mixed", name, 0);

  call_cpu(op, stack);

  for (auto& [ours, face] : lent) {  // those that the kernel has resized
    if (face.storage().data() == ours.storage().data() && face.sizes() == ours.sizes()) continue;
    if (face.storage().data() != ours.storage().data()) {
      grow(ours, static_cast<int64_t>(face.storage().nbytes()));
      std::memcpy(const_cast<void*>(ours.storage().data()), face.storage().data(), face.storage().nbytes());
    }
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(face.sizes(), face.strides(), face.storage_offset());
  }
  auto device_of = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || is_ours(t)) return t;
    for (const auto& known : lent) {
      if (known.face.is_same(t)) return known.ours;
    }
    for (const auto& known : lent) {
      if (known.face.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) {
        return at::cpu::as_strided(known.ours, t.sizes(), t.strides(), t.storage_offset());
      }
    }
    return adopt(t);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = device_of(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> ours;
      for (const Tensor& t : value.toTensorList()) ours.push_back(device_of(t));
      value = ours;
    }
  }
}

// ------------------------------------------------------------------------------------------------ kernels of their own

Tensor empty(at::IntArrayRef size, c10::optional<ScalarType> dtype, c10::optional<at::Layout>, c10::optional<Device>,
             c10::optional<bool>, c10::optional<at::MemoryFormat> format) {
  note_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype),
                                   format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, c10::optional<ScalarType> dtype,
                     c10::optional<at::Layout>, c10::optional<Device>, c10::optional<bool>) {
  note_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool to = is_ours(self), from = is_ours(source);
  const auto bytes = static_cast<int64_t>(source.nbytes());
  // PyTorch waits unless it is told not to, and the driver wherever memory is not page-locked.
  const bool async = non_blocking && pinned.holds((to ? source : self).storage().data());
  if (to && !from) note(async ? "h2d async" : "h2d", "aten::copy_", bytes);
  if (!to && from) note(async ? "d2h async" : "d2h", "aten::copy_", bytes);
  if (to && from && watch.operators) note("op", "aten::copy_", 0);
  Tensor target = to ? lend(self) : self;
  target.copy_(from ? lend(source) : source);
  return self;
}

at::Scalar item(const Tensor& self) {
  note("item", "aten::_local_scalar_dense", 0);
  return at::_local_scalar_dense(lend(self));
}

bool is_pinned(const Tensor& self, c10::optional<Device>) { return pinned.holds(self.storage().data()); }

Tensor pin(const Tensor& self, c10::optional<Device>) {
  const auto bytes = static_cast<int64_t>(self.numel() * self.itemsize());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, pinned.allocate(bytes), &pinned, false);
  auto result = make_tensor(std::move(storage), DispatchKey::CPU, self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_contiguous(self.sizes());
  return result.copy_(self);
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::set_(self, std::move(source), offset, size, stride);
}
Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return at::cpu::set_(self, std::move(source), 0, {size}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return at::cpu::set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor& set_empty(Tensor& self) {
  auto fresh = empty({0}, c10::typeMetaToScalarType(self.dtype()), {}, {}, {}, {});
  return at::cpu::set_(self, fresh.storage(), 0, {0}, {1});
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const c10::optional<Tensor>& mask, double dropout,
                 bool causal, c10::optional<double> scale
#if NEWER_THAN(2, 4)
                 , bool gqa
#endif
) {
#if NEWER_THAN(2, 4)
  return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, {}, scale, gqa));
#else
  return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, {}, scale));
#endif
}

// The gradient scaler's two, which have a CPU kernel from torch 2.3 on only.
void unscale(at::TensorList gradients, Tensor& found, const Tensor& inverse) {
  auto answer = lend(found), factor = lend(inverse);
  for (const Tensor& gradient : gradients) {
    auto face = lend(gradient);
    if (!at::isfinite(face).all().item<bool>()) answer.fill_(1);
    face.mul_(factor);
  }
}
Tensor& update_scale(Tensor& scale, Tensor& tracker, const Tensor& found, double growth, double backoff,
                     int64_t interval) {
  auto own = lend(scale), steps = lend(tracker);
  if (lend(found).item<float>() != 0) {
    own.mul_(backoff);
    steps.zero_();
  } else if (steps.item<int64_t>() + 1 == interval) {
    own.mul_(growth);
    steps.zero_();
  } else {
    steps.add_(1);
  }
  return scale;
}

torch::Library* library = nullptr;
torch::Library* everywhere = nullptr;
torch::Library* differentiable = nullptr;

// Makes the device; returns how many operators run by run_on_cpu. It can't be taken away again.
int64_t install() {
  if (library != nullptr) return 0;
  c10::impl::DeviceGuardImplRegistrar registrar(kFake, new FakeGuard());
  c10::SetAllocator(kFake, &allocator, 255);
  // PyTorch keeps the object that answers for CUDA in a static; it has no members, so ours is built in its place.
  static_assert(sizeof(FakeHooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) FakeHooks();
  library = new torch::Library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  std::unordered_set<std::string> own;
  auto use = [&own](const char* name, torch::CppFunction&& kernel) {
    own.insert(std::string("aten::") + name);
    library->impl(name, std::move(kernel));
  };
#define KERNEL(function) torch::CppFunction::makeFromUnboxedFunction(TORCH_FN(function))
  use("empty.memory_format", KERNEL(empty));
  use("empty_strided", KERNEL(empty_strided));
  use("copy_", KERNEL(copy));
  use("_local_scalar_dense", KERNEL(item));
  use("resize_", KERNEL(resize));
  use("as_strided", KERNEL(at::cpu::as_strided));
  use("view", KERNEL(at::cpu::view));
  use("_reshape_alias", KERNEL(at::cpu::_reshape_alias));
  use("unfold", KERNEL(at::cpu::unfold));
  use("view_as_real", KERNEL(at::cpu::view_as_real));
  use("view_as_complex", KERNEL(at::cpu::view_as_complex));
  use("set_.source_Storage_storage_offset", KERNEL(set_storage));
  use("set_.source_Storage", KERNEL(set_whole_storage));
  use("set_.source_Tensor", KERNEL(set_tensor));
  use("is_pinned", KERNEL(is_pinned));
  use("_pin_memory", KERNEL(pin));
  use("set_", KERNEL(set_empty));
  use("scaled_dot_product_attention", KERNEL(attention));
  use("_amp_foreach_non_finite_check_and_unscale_", KERNEL(unscale));
  use("_amp_update_scale_", KERNEL(update_scale));
  differentiable = new torch::Library(torch::Library::IMPL, "aten", DispatchKey::AutogradCUDA, __FILE__, __LINE__);
  differentiable->impl("scaled_dot_product_attention", KERNEL(attention));

  // These have one kernel for all devices, which chooses a library itself.
  const std::unordered_set<std::string> always = {"aten::convolution", "aten::convolution_backward"};
  int64_t replaced = 0;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto full = c10::toString(name);
    if (own.count(full)) continue;
    auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema()) continue;
    // A CPU build has no kernels for CUDA; those of its CPU are nearly the same list.
    const bool known = op->hasKernelForDispatchKey(DispatchKey::CUDA) || op->hasKernelForDispatchKey(DispatchKey::CPU);
    if (!known && !always.count(full)) continue;
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
    ++replaced;
  }
  everywhere = new torch::Library(torch::Library::IMPL, "_", DispatchKey::CUDA, __FILE__, __LINE__);
  everywhere->fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  return replaced;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install);
  m.def("set_hook", [](pybind11::object hook, bool operators) {
    watch.on = false;
    Py_XDECREF(watch.hook);
    watch.hook = hook.is_none() ? nullptr : hook.inc_ref().ptr();
    watch.operators = operators;
    watch.on = watch.hook != nullptr;
  }, pybind11::arg("hook"), pybind11::arg("operators") = false);
  m.def("memory", [] { return std::make_pair(memory.now.load(), memory.peak.load()); }, "bytes in use, and the peak");
  m.def("reset_peak", [] { memory.peak = memory.now.load(); });
  m.def("set_limit", [](int64_t bytes) { memory.limit = bytes; }, "the device's bytes; 0: no limit");
  m.def("widened", [] {
    std::lock_guard<std::mutex> guard(widened_lock);
    return std::vector<std::string>(widened.begin(), widened.end());
  }, "operators that computed in float32 and rounded to half precision");
}
