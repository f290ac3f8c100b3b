// A list of tensors that the native engines can work on: the tensors, and the flat memory behind
// them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/ScalarType.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/flat_index.h"
#include "core/units.h"

namespace gradclip::binding {

// The device of the CUDA engine. The tests' emulation runs that engine on CPU memory instead.
#if defined(GRADCLIP_EMULATION)
inline constexpr c10::DeviceType kGpuDevice = c10::DeviceType::CPU;
inline constexpr c10::DispatchKey kGpuKey = c10::DispatchKey::CPU;
#else
inline constexpr c10::DeviceType kGpuDevice = c10::DeviceType::CUDA;
inline constexpr c10::DispatchKey kGpuKey = c10::DispatchKey::CUDA;
#endif

// Whether the tensor's memory may be read and written without the dispatcher: once the dispatch
// keys that do not change what is stored are masked, only plain CPU is left, or plain CUDA in a
// build with that engine, and the kernels support its dtype. FakeTensor, meta, wrapper
// subclasses, functorch, nested, quantized and MKL-DNN tensors also look strided, but have other
// keys.
bool is_native(const at::Tensor& tensor);

// Whether its elements fill one contiguous block of memory, in any order of dimensions.
bool is_flat(const at::Tensor& tensor);

// The engines' name for a dtype, nullopt if they do not support it; complex numbers are pairs of
// reals.
std::optional<DType> native_dtype(at::ScalarType dtype);

// Whether nothing is active on this thread that expects to see every torch operation: a dispatch
// mode, a functorch transform or a jit trace. (Function modes live in Python; see
// python_tensors.h.)
bool operations_are_unobserved();

class TensorList {
 public:
  // Complex numbers are pairs of reals for the L2 norm and for scaling, and for nothing else.
  explicit TensorList(bool accept_complex) : accept_complex_(accept_complex) {}
  ~TensorList();
  TensorList(TensorList&&) = default;
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  void reserve(size_t count);

  // The list borrows the tensor until `hold` is called: taking a reference is an atomic operation,
  // and loads of the next tensor would wait for it.
  void add(const at::Tensor& tensor);

  // Stands for a parameter that has no gradient.
  void skip() { skipped_.push_back(listed_++); }

  // What keeps all tensors alive instead, until the list is destroyed.
  void set_owner(std::shared_ptr<void> owner) { owner_ = std::move(owner); }

  // Keeps what was added so far alive. Needed before anything runs that may drop a tensor: Python
  // code, or other threads once the GIL is released.
  void hold();

  // Call it once, after adding the last tensor. False if any of them is for the fallback, or if
  // they are on several devices.
  bool accept();

  const std::vector<at::Tensor>& tensors() const { return tensors_; }

  // How many were added or skipped, and the place among these of each tensor that is not empty; the
  // index leaves empty ones out.
  int64_t listed() const { return listed_; }
  std::vector<int64_t> positions() const;

  // The device of all of them; only for a list that is not empty.
  c10::Device device() const { return tensors_.front().device(); }
  bool are_on_gpu() const { return device().type() == kGpuDevice; }

  // The dtype torch gives the norm of these tensors.
  at::ScalarType norm_dtype() const { return norm_dtype_; }

  // For measuring; does not materialize copy-on-write tensors.
  const FlatIndex& index_for_reading() const { return index_; }

  // For writing; materializes copy-on-write tensors.
  const FlatIndex& index_for_writing() const;

  // The same, split into as few indices as possible so that no two tensors of an index share
  // memory: a single index unless some do. Sorts the tensors, so call it as late as possible.
  std::vector<FlatIndex> disjoint_indices_for_writing() const;

  // Whether two tensors share memory, or one is listed twice.
  bool share_memory() const;

  // The first element of each tensor that is not empty, for reading.
  std::vector<const void*> pointers() const;

  // Whether each row of each tensor, by its first dimension, is one contiguous block of memory. A
  // tensor of fewer than two dimensions is a single row.
  bool rows_are_blocks() const;

  // As every in-place operation does, so that autograd notices the change.
  void bump_versions() const;

 private:
  bool accept_complex_;
  std::vector<at::Tensor> tensors_;
  // Those before this one are held, the others borrowed.
  size_t held_ = 0;
  std::shared_ptr<void> owner_;
  // The places of parameters without a gradient.
  std::vector<int64_t> skipped_;
  int64_t listed_ = 0;
  // Materializing gives a tensor other memory, which is then also where it has to be read.
  mutable FlatIndex index_;
  at::ScalarType norm_dtype_ = at::ScalarType::Undefined;
};

// The rows of the gradients that are not empty, for writing, and of their parameters, which have
// the same shapes and rows that are blocks.
std::vector<Rows> rows_of(const TensorList& gradients, const TensorList& parameters);

}  // namespace gradclip::binding
