// A list of tensors that the native engines can work on: the tensors, held alive, and the flat
// memory behind them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <vector>

#include "core/flat_index.h"

namespace gradclip::binding {

// What the CUDA engine works on. Its emulation in the tests works on the CPU's memory instead.
#if defined(GRADCLIP_EMULATION)
inline constexpr c10::DeviceType kGpuDevice = c10::DeviceType::CPU;
inline constexpr c10::DispatchKey kGpuKey = c10::DispatchKey::CPU;
#else
inline constexpr c10::DeviceType kGpuDevice = c10::DeviceType::CUDA;
inline constexpr c10::DispatchKey kGpuKey = c10::DispatchKey::CUDA;
#endif

// Whether the tensor's memory may be read and written behind the dispatcher's back: its dispatch
// keys say plain CPU, or plain CUDA where there is an engine for it, once those that do not change
// what is stored are masked, and its dtype is one the kernels know. FakeTensor, meta, wrapper
// subclasses, functorch, nested, quantized and MKL-DNN tensors also look strided, but have other
// keys.
bool is_native(const at::Tensor& tensor);

// Whether its elements fill one block of memory, in whatever order of dimensions.
bool is_flat(const at::Tensor& tensor);

// The dtype as the engines know it, where they do; complex numbers are pairs of reals.
std::optional<DType> native_dtype(at::ScalarType dtype);

// Whether nothing is active on this thread that expects to see every torch operation: a dispatch
// mode, a functorch transform or a jit trace. (Function modes are Python's; see python_tensors.h.)
bool operations_are_unobserved();

class TensorList {
 public:
  // Complex numbers are pairs of reals for the L2 norm and for scaling, and for nothing else.
  explicit TensorList(bool accept_complex) : accept_complex_(accept_complex) {}

  void reserve(size_t count);

  void add(const at::Tensor& tensor);

  // Stands for a parameter that has no gradient.
  void skip() { ++listed_; }

  // To be called once, after the last one was added. False when any of the tensors is for the
  // fallback, or when they are on several devices.
  bool accept();

  const std::vector<at::Tensor>& tensors() const { return tensors_; }

  // How many were added or skipped, and which of these each tensor that is not empty was: empty
  // ones are none of the index's tensors.
  int64_t listed() const { return listed_; }
  std::vector<int64_t> positions() const;

  // Where all of them lie; for a list that is not empty.
  c10::Device device() const { return tensors_.front().device(); }
  bool are_on_gpu() const { return device().type() == kGpuDevice; }

  // The dtype torch gives the norm of these tensors.
  at::ScalarType norm_dtype() const { return norm_dtype_; }

  // For measuring; leaves copy-on-write tensors shared.
  FlatIndex index_for_reading() const { return FlatIndex(spans_); }

  // For writing; gives copy-on-write tensors memory of their own.
  FlatIndex index_for_writing() const;

  // The same in as few indices as can be, none of which holds two tensors that share memory: a
  // single one unless some do. Sorts the tensors, so call it only once it is needed.
  std::vector<FlatIndex> disjoint_indices_for_writing() const;

  // Where the tensors that are not empty begin, for reading.
  std::vector<const void*> pointers() const;

  // As every in-place operation does, so that autograd notices the change.
  void bump_versions() const;

 private:
  bool accept_complex_;
  std::vector<at::Tensor> tensors_;
  std::vector<int64_t> positions_;
  int64_t listed_ = 0;
  std::vector<Span> spans_;
  at::ScalarType norm_dtype_ = at::ScalarType::Undefined;
};

}  // namespace gradclip::binding
