// The lists of gradients that the sweep clips, and what the variants have to make of them. Plain
// C++, with all cores.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/flat_index.h"
#include "core/span.h"

namespace gradclip::cuda::sweep {

struct Shape {
  int64_t numel;
  DType dtype;
  // Elements between a 16-byte border and the first one.
  int64_t offset = 0;
};

// Tensors in one piece of memory, with guard bytes between them.
class List {
 public:
  List(std::string name, std::vector<Shape> shapes);

  const std::string& name() const { return name_; }
  int64_t tensors() const { return static_cast<int64_t>(shapes_.size()); }
  const std::vector<Shape>& shapes() const { return shapes_; }
  // Of the tensors alone.
  int64_t bytes() const { return bytes_; }
  // Of the piece of memory.
  int64_t size() const { return size_; }

  // Where the tensors lie in a piece of memory, which has to begin on a 16-byte border.
  FlatIndex index(void* memory) const;

  // Fills it with random numbers from (-1, 1) and guards.
  void fill(uint64_t seed, void* memory) const;

  // The L2 norm in float64, of what fill has written.
  double norm(const void* memory) const;

  // What is wrong with `after`, which should be `before` times the coefficient; empty if nothing
  // is. A coefficient of 1 has to leave every bit alone.
  std::string difference(const void* before, const void* after, double coefficient) const;

 private:
  // Calls work(part) for each of `parts` parts of the tensors, from many threads.
  void for_parts(const std::function<void(int64_t part, int64_t tensor, int64_t begin,
                                          int64_t end)>& work) const;

  std::string name_;
  std::vector<Shape> shapes_;
  // In bytes.
  std::vector<int64_t> begin_;
  int64_t bytes_ = 0;
  int64_t size_ = 0;
};

// Whether an unrounded norm is within the bound of csrc/core/norm.h: 7 roundings to float32 of what
// is then under the root, and a thousandth.
bool is_right_norm(double actual, double expected);

// `bytes` in as many tensors, of float32.
List equal_tensors(int64_t bytes, int64_t tensors);
// Every dtype and alignment, tensors from one element to several workers' share.
List mixed();
// The shapes of bench/workloads.py. Of Llama-3-8B, in bfloat16, the first blocks alone.
List resnet50();
List gpt2();
List llama3_blocks(int blocks);

}  // namespace gradclip::cuda::sweep
