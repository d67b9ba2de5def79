// Row-wise kernels on CPU: a row's bits depend on that row alone.
//
// Every element goes through the same vector code: the last vector of a row is loaded with its missing lanes
// filled and stored with a count. Sums over a row use a fixed set of lane accumulators joined in a fixed
// order. Threads only ever share out independent rows (or fixed blocks), so their number changes no bit.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <c10/util/FunctionRef.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "memory.h"
#include "storage.h"
#include "threads.h"

namespace toolkit::rows {

using at::Tensor;
template <typename T>
using Vec = at::vec::Vectorized<T>;

// Elements of cheap work below which one thread is faster than waking another.
constexpr int64_t kGrain = 32768;

// float for the 32- and 16-bit formats, double for double.
inline at::ScalarType compute_type(const Tensor& x, const char* op) {
  TORCH_CHECK(dtypes::is_float(x.scalar_type()), op, ": dtype must be float32, float64, bfloat16 or float16, got ",
              x.scalar_type(), ".");
  return dtypes::upcast(x.scalar_type());
}

inline void check_equal_shapes(const char* op, const char* name, const Tensor& x, const char* other, const Tensor& y) {
  TORCH_CHECK(x.sizes() == y.sizes(), op, ": ", name, " must have the shape of ", other, ", ", y.sizes(), ", got ",
              x.sizes(), ".");
}

// A parameter, where given, must have one value for each column of x.
inline void check_row(const char* op, const char* name, const std::optional<Tensor>& parameter, const Tensor& x) {
  TORCH_CHECK(x.dim() > 0, op, ": x must have shape [..., N], got no dimensions.");
  TORCH_CHECK(!parameter || (parameter->dim() == 1 && parameter->size(0) == x.size(-1)), op, ": ", name, " has shape ",
              parameter ? parameter->sizes() : at::IntArrayRef{}, "; x of shape ", x.sizes(), " needs [", x.size(-1),
              "].");
}

// Calls body(float{}) or body(double{}).
template <typename Body>
inline void by_type(at::ScalarType type, const Body& body) {
  if (type == at::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

// A tensor of any leading shape seen as [count, width]: elements of a row are adjacent, rows `stride` apart.
// Keeps the tensor it reads from alive; copies only when the layout (or the dtype) leaves no other way.
struct Matrix {
  Matrix(const Tensor& x, at::ScalarType type) : tensor(storage::cast(x, type)) {
    const int64_t dims = tensor.dim();
    TORCH_CHECK(dims > 0, "a tensor without dimensions has no rows.");
    width = tensor.size(dims - 1);
    count = 1;
    for (int64_t d = 0; d < dims - 1; ++d) count *= tensor.size(d);
    stride = width;
    if (tensor.is_contiguous() || evenly_spaced()) return;
    tensor = tensor.contiguous();
    stride = width;
  }

  template <typename T>
  const T* row(int64_t i) const {
    return static_cast<const T*>(tensor.const_data_ptr()) + i * stride;
  }
  bool flat() const { return stride == width; }

  Tensor tensor;
  int64_t count, width, stride;

 private:
  bool evenly_spaced() {
    const int64_t dims = tensor.dim();
    if (dims < 2 || tensor.numel() == 0 || (width > 1 && tensor.stride(dims - 1) != 1)) return false;
    int64_t expected = -1;
    for (int64_t d = dims - 2; d >= 0; --d) {
      if (tensor.size(d) == 1) continue;
      if (expected < 0) {
        stride = tensor.stride(d);
      } else if (tensor.stride(d) != expected) {
        return false;
      }
      expected = tensor.stride(d) * tensor.size(d);
    }
    return true;
  }
};

inline Tensor empty(at::IntArrayRef sizes, const Tensor& like, at::ScalarType type) {
  return memory::empty(sizes, like.options().dtype(type));
}

// The result in the dtype that the caller is owed.
using storage::cast;

// body(start, lanes) over [0, n) in vectors of T; lanes is a constant but for the last, partial vector.
template <typename T, typename Body>
inline void for_vectors(int64_t n, const Body& body) {
  constexpr int64_t kLanes = Vec<T>::size();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

// span(row, column, length) over all elements: whole rows, or any stretch of one long row when `flat`.
// For elementwise work only; `weight` is the cost of an element in units of a simple one.
inline void for_spans(bool flat, int64_t count, int64_t width, int64_t weight,
                      c10::function_ref<void(int64_t, int64_t, int64_t)> span) {
  if (width == 0) return;
  if (flat) {
    threads::parallel_for(0, count * width, kGrain / weight,
                     [&](int64_t begin, int64_t end) { span(0, begin, end - begin); });
  } else {
    threads::parallel_for(0, count, std::max<int64_t>(1, kGrain / weight / width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) span(r, 0, width);
    });
  }
}

// body(first, last) over ranges of rows of this width.
inline void for_rows(int64_t count, int64_t width, c10::function_ref<void(int64_t, int64_t)> body) {
  threads::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), body);
}

// Lane accumulators for a sum along a row: four vectors taken in turn, joined in a fixed order in double.
template <typename T>
struct Sum {
  Vec<T> part[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};

  double total() const {
    constexpr int kLanes = Vec<T>::size();
    T lane[kLanes];
    ((part[0] + part[1]) + (part[2] + part[3])).store(lane);
    double half[2] = {0.0, 0.0};
    for (int i = 0; i < kLanes; i += 2) {
      half[0] += lane[i];
      half[1] += lane[i + 1];
    }
    return half[0] + half[1];
  }
};

// add(slot, start, lanes) along a row of n: slot 0..3 says which accumulator takes the vector.
template <typename T, typename Add>
inline void accumulate(int64_t n, const Add& add) {
  constexpr int64_t kLanes = Vec<T>::size();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    add(0, i, kLanes);
    add(1, i + kLanes, kLanes);
    add(2, i + 2 * kLanes, kLanes);
    add(3, i + 3 * kLanes, kLanes);
  }
  for (int slot = 0; i < n; i += kLanes, ++slot) add(slot, i, std::min(kLanes, n - i));
}

// The missing lanes of a partial vector set to `fill`.
template <typename T>
inline Vec<T> filled(Vec<T> x, int64_t lanes, T fill) {
  return lanes == Vec<T>::size() ? x : Vec<T>::set(Vec<T>(fill), x, lanes);
}

// The largest of a row of at least one; NaN if there is one.
template <typename T>
inline T largest(const T* x, int64_t n) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Vec<T> top[4] = {Vec<T>(kLowest), Vec<T>(kLowest), Vec<T>(kLowest), Vec<T>(kLowest)};
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    top[slot] = at::vec::maximum(top[slot], filled(Vec<T>::loadu(x + i, lanes), lanes, kLowest));
  });
  T lane[Vec<T>::size()];
  at::vec::maximum(at::vec::maximum(top[0], top[1]), at::vec::maximum(top[2], top[3])).store(lane);
  T max = lane[0];
  for (T v : lane) max = (v > max || v != v) ? v : max;
  return max;
}

// Sums over rows (gradients of weights): rows in fixed blocks, block sums added in order. The blocks depend on
// the number of rows only, so the result is bitwise identical for any number of threads.
struct Blocks {
  explicit Blocks(int64_t rows)
      : rows(rows), size(std::max<int64_t>(16, (rows + 63) / 64)), count((rows + size - 1) / size) {}
  int64_t rows, size, count;

  // partial(first row, last row, sums): `sums` holds `width` zeros to add the block's rows to;
  // the total of all blocks is written to `out`.
  template <typename T>
  void sum(int64_t width, T* out, c10::function_ref<void(int64_t, int64_t, std::type_identity_t<T>*)> partial) const {
    std::vector<T> sums(count * width, T(0));
    threads::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size * width)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t b = begin; b < end; ++b) {
                         partial(b * size, std::min(rows, (b + 1) * size), sums.data() + b * width);
                       }
                     });
    std::fill(out, out + width, T(0));
    for (int64_t b = 0; b < count; ++b) {
      const T* block = sums.data() + b * width;
      for (int64_t c = 0; c < width; ++c) out[c] += block[c];
    }
  }
};

}  // namespace toolkit::rows
