#include "binding/tensor_list.h"

#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <utility>

#include "core/overlap.h"

namespace gradclip::binding {
namespace {

// These keys wrap an operation (record it, cast its inputs) or are undone by taking magnitudes
// (conjugate, negative); the memory beneath is that of a plain tensor.
const c10::DispatchKeySet kTransparentKeys =
    c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
    c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Conjugate,
                         c10::DispatchKey::Negative});

Span span_of(const at::Tensor& tensor, void* data) {
  const int64_t reals_per_element = c10::isComplexType(tensor.scalar_type()) ? 2 : 1;
  return {data, tensor.numel() * reals_per_element, *native_dtype(tensor.scalar_type())};
}

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
  return is_engines(tensor.key_set() - kTransparentKeys) && native_dtype(tensor.scalar_type()) &&
         !has_tangent(tensor) &&
         // Torch raises when these are written outside of inference mode, and so must we.
         (!tensor.is_inference() || c10::InferenceMode::is_enabled());
}

bool is_flat(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!impl->is_non_overlapping_and_dense() || tensor.const_data_ptr() == nullptr) return false;
  // A storage may have been resized to less than its tensors need, which torch does not check.
  const int64_t end = tensor.storage_offset() + tensor.numel();
  return static_cast<size_t>(end) * tensor.itemsize() <= impl->unsafe_storage().nbytes();
}

bool operations_are_unobserved() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return !c10::impl::dispatch_mode_enabled() &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::Tracer);
}

void TensorList::reserve(size_t count) {
  tensors_.reserve(count);
  positions_.reserve(count);
}

void TensorList::add(const at::Tensor& tensor) {
  // Prefetch what accept will read: with a few hundred tensors none of it is cached, and it arrives
  // while the next ones are added.
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 64);
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 128);
  if (const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl()) {
    __builtin_prefetch(storage);
    __builtin_prefetch(reinterpret_cast<const char*>(storage) + 64);
  }
  tensors_.push_back(tensor);
  positions_.push_back(listed_++);
}

std::vector<int64_t> TensorList::positions() const {
  std::vector<int64_t> result;
  result.reserve(positions_.size());
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (spans_[i].numel > 0) result.push_back(positions_[i]);
  }
  return result;
}

bool TensorList::accept() {
  spans_.reserve(tensors_.size());
  for (const at::Tensor& tensor : tensors_) {
    if (!is_native(tensor) || !is_flat(tensor)) return false;
    const at::ScalarType dtype = tensor.scalar_type();
    if (!accept_complex_ && c10::isComplexType(dtype)) return false;
    const at::ScalarType real_dtype = c10::toRealValueType(dtype);
    if (spans_.empty()) {
      norm_dtype_ = real_dtype;
    } else if (real_dtype != norm_dtype_) {
      norm_dtype_ = c10::promoteTypes(norm_dtype_, real_dtype);
    }
    // Nothing writes through this span; index_for_writing makes its own.
    spans_.push_back(span_of(tensor, const_cast<void*>(tensor.const_data_ptr())));
    if (tensor.device() != device()) return false;
    if (are_on_gpu() && !is_aligned(spans_.back())) return false;
  }
  return true;
}

FlatIndex TensorList::index_for_writing() const {
  std::vector<Span> spans;
  spans.reserve(tensors_.size());
  for (const at::Tensor& tensor : tensors_) {
    spans.push_back(span_of(tensor, tensor.mutable_data_ptr()));
  }
  return FlatIndex(std::move(spans));
}

std::vector<const void*> TensorList::pointers() const {
  std::vector<const void*> result;
  for (const Span& span : spans_) {
    if (span.numel > 0) result.push_back(span.data);
  }
  return result;
}

std::vector<FlatIndex> TensorList::disjoint_indices_for_writing() const {
  FlatIndex index = index_for_writing();
  if (share_memory(index)) return disjoint_groups(index);
  std::vector<FlatIndex> whole;
  whole.push_back(std::move(index));
  return whole;
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
  const FlatIndex written = gradients.index_for_writing();
  const FlatIndex weights = parameters.index_for_reading();
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
