// Fresh memory for results. A large tensor is mapped anew by the allocator each time, and 4 KiB page faults then cost as
// much as the arithmetic of a row-wise op; the kernel is asked for huge pages inside of the tensor's own range.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace toolkit::memory {

inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t first = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + out.nbytes()) / kHugePage * kHugePage;
  // Advice only: a kernel without huge pages says no, and nothing is lost.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

}  // namespace toolkit::memory
