#include "binding/tensor_list.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <utility>

#include "core/duplicates.h"
#include "core/overlap.h"

namespace gradclip::binding {
namespace {

// These keys wrap an operation (record it, cast its inputs) or are undone by taking magnitudes
// (conjugate, negative); the memory beneath is that of a plain tensor.
const c10::DispatchKeySet kTransparentKeys =
    c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
    c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Conjugate,
                         c10::DispatchKey::Negative});

int64_t row_count(const at::Tensor& tensor) { return tensor.dim() > 1 ? tensor.size(0) : 1; }

bool is_engines(c10::DispatchKeySet keys) {
  if (keys == c10::DispatchKeySet(c10::DispatchKey::CPU)) return true;
#if GRADCLIP_WITH_CUDA
  if (keys == c10::DispatchKeySet(kGpuKey)) return true;
#endif
  return false;
}

// GPUs fault on loads that are not aligned to the element size, and memory from outside torch may
// not be.
bool is_aligned(const Span& span) {
  return reinterpret_cast<uintptr_t>(span.data) % element_size(span.dtype) == 0;
}

// Forward-mode AD: the tangent would have to be scaled too.
bool has_tangent(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->autograd_meta() != nullptr &&
         tensor._fw_grad(/*level=*/0).defined();
}

// All that is_native asks, except for the dtype.
bool is_plain(const at::Tensor& tensor) {
  return is_engines(tensor.key_set() - kTransparentKeys) && !has_tangent(tensor) &&
         // Torch raises when these are written outside of inference mode, and so must we.
         (!tensor.is_inference() || c10::InferenceMode::is_enabled());
}

// The memory of a tensor that is not empty, nullptr if it is not flat. For reading: a storage that
// is copied on write is left as it is.
const char* flat_data(const c10::TensorImpl& impl, int64_t numel, int64_t item_size) {
  const c10::StorageImpl* storage = impl.unsafe_storage().unsafeGetStorageImpl();
  if (storage == nullptr || !impl.is_non_overlapping_and_dense()) return nullptr;
  const char* data = static_cast<const char*>(storage->data());
  if (data == nullptr) return nullptr;
  const int64_t offset = impl.storage_offset();
  // A storage may have been resized to less than its tensors need, which torch does not check.
  if (static_cast<size_t>((offset + numel) * item_size) > storage->nbytes()) return nullptr;
  return data + offset * item_size;
}

// Whether each tensor has a block of the CPU allocator to itself. Nearly always so, and found out
// without sorting the tensors by address.
bool are_blocks_of_their_own(const std::vector<at::Tensor>& tensors) {
  // None for memory from elsewhere, of which two storages may hold the same.
  const c10::DeleterFnPtr deleter = c10::GetCPUAllocator()->raw_deleter();
  if (deleter == nullptr) return false;
  std::vector<const void*> storages;
  storages.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    const c10::StorageImpl* storage =
        tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    if (storage->data_ptr().get_deleter() != deleter) return false;
    storages.push_back(storage);
  }
  return !any_twice(storages.data(), storages.size());
}

}  // namespace

std::optional<DType> native_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
    case at::kComplexFloat:
      return DType::kFloat32;
    case at::kDouble:
    case at::kComplexDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

bool is_native(const at::Tensor& tensor) {
  return native_dtype(tensor.scalar_type()) && is_plain(tensor);
}

bool is_flat(const at::Tensor& tensor) {
  const int64_t numel = tensor.numel();
  return numel == 0 || flat_data(*tensor.unsafeGetTensorImpl(), numel,
                                 static_cast<int64_t>(tensor.itemsize())) != nullptr;
}

bool operations_are_unobserved() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return !c10::impl::dispatch_mode_enabled() &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::Tracer);
}

TensorList::~TensorList() {
  for (size_t i = held_; i < tensors_.size(); ++i) tensors_[i].unsafeReleaseTensorImpl();
}

void TensorList::reserve(size_t count) { tensors_.reserve(count); }

void TensorList::add(const at::Tensor& tensor) {
  // Prefetch what accept will read: with a few hundred tensors none of it is cached, and it arrives
  // while the next ones are added.
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 64);
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 128);
  if (const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl()) {
    __builtin_prefetch(storage);
    __builtin_prefetch(reinterpret_cast<const char*>(storage) + 64);
  }
  using Pointer = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  tensors_.emplace_back(Pointer::reclaim(impl));
  ++listed_;
}

void TensorList::hold() {
  for (; held_ < tensors_.size(); ++held_) {
    c10::raw::intrusive_ptr::incref(tensors_[held_].unsafeGetTensorImpl());
  }
}

std::vector<int64_t> TensorList::positions() const {
  std::vector<int64_t> result;
  result.reserve(tensors_.size());
  auto skipped = skipped_.begin();
  auto tensor = tensors_.begin();
  for (int64_t position = 0; position < listed_; ++position) {
    if (skipped != skipped_.end() && *skipped == position) {
      ++skipped;
    } else if ((tensor++)->numel() > 0) {
      result.push_back(position);
    }
  }
  return result;
}

bool TensorList::accept() {
  std::vector<Span> spans;
  spans.reserve(tensors_.size());
  at::ScalarType last = at::ScalarType::Undefined;
  DType dtype = DType::kFloat32;
  int64_t item_size = 0;
  int64_t reals_per_element = 1;
  const c10::Device first = tensors_.empty() ? c10::Device(c10::kCPU) : device();
  const bool needs_alignment = first.type() == kGpuDevice;
  for (const at::Tensor& tensor : tensors_) {
    // Neighbors mostly have the same one.
    if (const at::ScalarType scalar_type = tensor.scalar_type(); scalar_type != last) {
      const std::optional<DType> native = native_dtype(scalar_type);
      const bool is_complex = c10::isComplexType(scalar_type);
      if (!native || (is_complex && !accept_complex_)) return false;
      const at::ScalarType real_dtype = c10::toRealValueType(scalar_type);
      norm_dtype_ = last == at::ScalarType::Undefined ? real_dtype
                                                      : c10::promoteTypes(norm_dtype_, real_dtype);
      last = scalar_type;
      dtype = *native;
      reals_per_element = is_complex ? 2 : 1;
      item_size = reals_per_element * element_size(dtype);
    }
    if (!is_plain(tensor) || tensor.device() != first) return false;
    const int64_t numel = tensor.numel();
    if (numel == 0) continue;
    const char* data = flat_data(*tensor.unsafeGetTensorImpl(), numel, item_size);
    if (data == nullptr) return false;
    // Nothing writes through this span before index_for_writing has looked at it.
    spans.push_back({const_cast<char*>(data), numel * reals_per_element, dtype});
    if (needs_alignment && !is_aligned(spans.back())) return false;
  }
  index_ = FlatIndex(std::move(spans));
  return true;
}

const FlatIndex& TensorList::index_for_writing() const {
  int64_t next = 0;
  for (const at::Tensor& tensor : tensors_) {
    if (tensor.numel() == 0) continue;
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    // Materializes it, and raises what mutable_data_ptr of the tensor would.
    char* data = static_cast<char*>(impl->unsafe_storage().unsafeGetStorageImpl()->mutable_data());
    index_.move(next++, data + impl->storage_offset() * static_cast<int64_t>(impl->itemsize()));
  }
  return index_;
}

std::vector<const void*> TensorList::pointers() const {
  std::vector<const void*> result;
  result.reserve(index_.spans().size());
  for (const Span& span : index_.spans()) result.push_back(span.data);
  return result;
}

bool TensorList::share_memory() const {
  return !are_blocks_of_their_own(tensors_) && gradclip::share_memory(index_);
}

std::vector<FlatIndex> TensorList::disjoint_indices_for_writing() const {
  const FlatIndex& index = index_for_writing();
  if (share_memory()) return disjoint_groups(index);
  return {index};
}

bool TensorList::rows_are_blocks() const {
  // All are dense: if the first dimension steps over the other ones' elements, it is the outermost.
  return std::all_of(tensors_.begin(), tensors_.end(), [](const at::Tensor& tensor) {
    return tensor.numel() == 0 || row_count(tensor) == 1 ||
           tensor.stride(0) * row_count(tensor) == tensor.numel();
  });
}

void TensorList::bump_versions() const {
  for (const at::Tensor& tensor : tensors_) {
    // Inference tensors have no version.
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

std::vector<Rows> rows_of(const TensorList& gradients, const TensorList& parameters) {
  const FlatIndex& written = gradients.index_for_writing();
  const FlatIndex& weights = parameters.index_for_reading();
  std::vector<Rows> result;
  result.reserve(written.spans().size());
  for (const at::Tensor& gradient : gradients.tensors()) {
    if (gradient.numel() == 0) continue;
    const size_t i = result.size();
    result.push_back({written.spans()[i], weights.spans()[i], row_count(gradient)});
  }
  return result;
}

}  // namespace gradclip::binding
