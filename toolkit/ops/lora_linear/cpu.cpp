// y[t] = base[t] + scaling[l] (x[t] A_l^T) B_l^T with l = adapters[t], and its gradients, on CPU.
//
// Rows are grouped by adapter with a stable counting sort and copied together in blocks. An output of a row is chains
// of multiply-adds over K and R in a fixed order, so a row is batch-invariant, given its adapter. The gradients of
// A and B add an adapter's rows in their order, in blocks of kSummed rows.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "columns.h"
#include "dtypes.h"
#include "matmul.h"
#include "storage.h"

namespace toolkit::lora_linear_op {

constexpr int64_t kRows = 32;                 // rows that are worked on together
constexpr int64_t kColumns = 512;             // outputs at a time: kRows of them stay in L2
constexpr int64_t kSummed = 256;              // rows of a block of a weight's gradient
constexpr int64_t kParallelWork = 1 << 19;    // multiply-adds that repay waking another thread
constexpr int64_t kPad = 16;                  // keeps rows of copies out of each other's cache sets

inline int64_t workers(int64_t multiply_adds) { return multiply_adds < kParallelWork ? 1 : at::get_num_threads(); }

using storage::read_row;
using storage::write_row;
using threads::scratch;

// Rows by adapter, in their order; group l is order[start[l]] ... order[start[l + 1] - 1], rows without adapter last.
struct Groups {
  Groups(const at::Tensor& adapters, int64_t count) : start(count + 2, 0), order(adapters.numel()) {
    const int64_t* id = adapters.const_data_ptr<int64_t>();
    const int64_t rows = adapters.numel();
    for (int64_t t = 0; t < rows; ++t) {
      TORCH_CHECK_INDEX(id[t] < count, "adapters must be negative or 0 to ", count - 1, ", got ", id[t], ".");
      ++start[(id[t] < 0 ? count : id[t]) + 1];
    }
    for (int64_t l = 0; l <= count; ++l) start[l + 1] += start[l];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t t = 0; t < rows; ++t) order[next[id[t] < 0 ? count : id[t]]++] = t;
  }
  std::vector<int64_t> start, order;
};

// Tensors as pointers; rows of x, base, grad and the results are adjacent.
template <typename S>
struct Adapters {
  const S *a, *b;
  const double* scaling;
  int64_t rank, inner, outputs;  // R, K, N
  const S* first(int64_t l) const { return a + l * rank * inner; }
  const S* second(int64_t l) const { return b + l * outputs * rank; }
};

// out[m, n] (+)= sum_k x[m, k] w[n, k]: rows of w are adjacent in k.
template <typename T, typename S>
void by_rows(const T* x, int64_t x_stride, int64_t rows, const S* w, int64_t outputs, int64_t depth, T* out,
             int64_t out_stride, bool add) {
  matmul::compute<T, S>({x, x_stride, w, depth, nullptr, out, out_stride, rows, outputs, depth, add});
}

template <typename T>
void scale_all(T* values, int64_t count, double factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<T>(factor);
}

struct Block {
  int64_t adapter, begin, end;  // indices into Groups::order
};

template <typename T, typename S>
void forward_block(const Adapters<S>& w, const Block& block, const int64_t* order, const S* base, const S* x, S* out) {
  const int64_t rows = block.end - block.begin, l = block.adapter, x_stride = w.inner + kPad;
  order += block.begin;
  T* const xs = scratch<T, 1>(rows * x_stride);
  T* const low = scratch<T, 2>(rows * w.rank);
  T* const ys = scratch<T, 3>(rows * kColumns);
  for (int64_t r = 0; r < rows; ++r) read_row(x + order[r] * w.inner, w.inner, xs + r * x_stride);
  by_rows(xs, x_stride, rows, w.first(l), w.rank, w.inner, low, w.rank, false);
  scale_all(low, rows * w.rank, w.scaling[l]);
  for (int64_t n = 0; n < w.outputs; n += kColumns) {
    const int64_t width = std::min(kColumns, w.outputs - n);
    for (int64_t r = 0; r < rows; ++r) read_row(base + order[r] * w.outputs + n, width, ys + r * kColumns);
    by_rows(low, w.rank, rows, w.second(l) + n * w.rank, width, w.rank, ys, kColumns, true);
    for (int64_t r = 0; r < rows; ++r) write_row(ys + r * kColumns, width, out + order[r] * w.outputs + n);
  }
}

template <typename T, typename S>
void forward(const Adapters<S>& w, const Groups& groups, int64_t count, const S* base, const S* x, S* out) {
  std::vector<Block> blocks;
  for (int64_t l = 0; l < count; ++l)
    for (int64_t t = groups.start[l]; t < groups.start[l + 1]; t += kRows)
      blocks.push_back({l, t, std::min(t + kRows, groups.start[l + 1])});
  const int64_t work = groups.start[count] * w.rank * (w.inner + w.outputs);
  threads::run_tasks(blocks.size(), workers(work), [&](int64_t i) {
    forward_block<T>(w, blocks[i], groups.order.data(), base, x, out);
  });
  const int64_t grain = kParallelWork / (w.outputs + 1) + 1;
  threads::parallel_for(groups.start[count], groups.start[count + 1], grain, [&](int64_t begin, int64_t end) {
    for (const int64_t* t = groups.order.data() + begin; t < groups.order.data() + end; ++t)
      std::copy_n(base + *t * w.outputs, w.outputs, out + *t * w.outputs);
  });
}

// One block of at most kSummed rows of an adapter: its rows of dx, and its part of dA and dB, which `add` to the former.
template <typename T, typename S>
struct Backward {
  const Adapters<S>& w;
  const int64_t* order;
  const S *grad, *x;
  S* dx;  // or null
  T *da, *db;  // of all adapters, or null
  std::vector<T> xs, gs, low, up;

  void run(const Block& block, bool add) {
    const int64_t rows = block.end - block.begin, l = block.adapter;
    const int64_t x_stride = w.inner + kPad, g_stride = w.outputs + kPad;
    const int64_t* const at = order + block.begin;
    xs.resize(kSummed * x_stride);
    gs.resize(kSummed * g_stride);
    low.resize(kSummed * w.rank);
    up.resize(kSummed * w.rank);
    const int64_t parts = (rows + kRows - 1) / kRows;
    threads::run_tasks(parts, workers(rows * w.rank * (2 * w.inner + w.outputs)), [&](int64_t part) {
      const int64_t begin = part * kRows, count = std::min(kRows, rows - begin);
      T *const x_part = xs.data() + begin * x_stride, *const g_part = gs.data() + begin * g_stride;
      T *const low_part = low.data() + begin * w.rank, *const up_part = up.data() + begin * w.rank;
      for (int64_t r = 0; r < count; ++r) {
        read_row(x + at[begin + r] * w.inner, w.inner, x_part + r * x_stride);
        read_row(grad + at[begin + r] * w.outputs, w.outputs, g_part + r * g_stride);
      }
      if (db != nullptr) {
        by_rows(x_part, x_stride, count, w.first(l), w.rank, w.inner, low_part, w.rank, false);
        scale_all(low_part, count * w.rank, w.scaling[l]);
      }
      if (dx == nullptr && da == nullptr) return;
      columns::multiply<false>(g_part, g_stride, count, w.second(l), w.rank, w.rank, w.outputs, up_part, w.rank, false);
      scale_all(up_part, count * w.rank, w.scaling[l]);
      if (dx == nullptr) return;
      T* const result = scratch<T, 1>(count * x_stride);
      columns::multiply<false>(up_part, w.rank, count, w.first(l), w.inner, w.inner, w.rank, result, x_stride, false);
      for (int64_t r = 0; r < count; ++r) write_row(result + r * x_stride, w.inner, dx + at[begin + r] * w.inner);
    });
    if (da != nullptr)
      threads::run_tasks((w.inner + kColumns - 1) / kColumns, workers(rows * w.rank * w.inner), [&](int64_t part) {
        const int64_t k = part * kColumns;
        columns::multiply<true>(up.data(), w.rank, w.rank, xs.data() + k, x_stride, std::min(kColumns, w.inner - k),
                                rows, da + l * w.rank * w.inner + k, w.inner, add);
      });
    if (db != nullptr)
      threads::run_tasks((w.outputs + kColumns - 1) / kColumns, workers(rows * w.rank * w.outputs), [&](int64_t part) {
        const int64_t n = part * kColumns;
        columns::multiply<true>(gs.data() + n, g_stride, std::min(kColumns, w.outputs - n), low.data(), w.rank, w.rank,
                                rows, db + (l * w.outputs + n) * w.rank, w.rank, add);
      });
  }
};

void check(const char* op, const at::Tensor& base, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
           const at::Tensor& scaling, const at::Tensor& adapters) {
  TORCH_CHECK(base.dim() == 2 && x.dim() == 2 && a.dim() == 3 && b.dim() == 3 && a.size(2) == x.size(1) &&
                  b.size(0) == a.size(0) && b.size(1) == base.size(1) && b.size(2) == a.size(1) &&
                  base.size(0) == x.size(0),
              op, ": rows, x, a and b must have shapes [T, N], [T, K], [L, R, K] and [L, N, R], got ", base.sizes(),
              ", ", x.sizes(), ", ", a.sizes(), " and ", b.sizes(), ".");
  TORCH_CHECK(scaling.dim() == 1 && scaling.size(0) == a.size(0) && adapters.dim() == 1 &&
                  adapters.size(0) == x.size(0) && adapters.scalar_type() == at::kLong,
              op, ": scaling and adapters must have shapes [L] and int64 [T], got ", scaling.sizes(), " and ",
              adapters.sizes(), " of ", adapters.scalar_type(), ".");
  TORCH_CHECK(
      base.scalar_type() == x.scalar_type() && a.scalar_type() == x.scalar_type() && b.scalar_type() == x.scalar_type(),
      op, ": rows, x, a and b must have the same dtype, got ", base.scalar_type(), ", ", x.scalar_type(), ", ",
      a.scalar_type(), ", ", b.scalar_type(), ".");
  TORCH_CHECK(dtypes::is_float(x.scalar_type()), op, ": x must have dtype float32, float64, bfloat16 or float16, got ",
              x.scalar_type(), ".");
}

at::Tensor lora_add(const at::Tensor& base, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b,
                    const at::Tensor& scaling, const at::Tensor& adapters) {
  check("lora_add", base, x, a, b, scaling, adapters);
  const at::Tensor from = base.contiguous(), rows = x.contiguous(), first = a.contiguous(), second = b.contiguous();
  const at::Tensor factors = scaling.to(at::kDouble).contiguous(), ids = adapters.contiguous();
  const Groups groups(ids, a.size(0));
  at::Tensor out = at::empty(base.sizes(), base.options());
  dtypes::with_types(x.scalar_type(), [&](auto compute, auto stored) {
    using T = decltype(compute);
    using S = decltype(stored);
    const Adapters<S> w{first.const_data_ptr<S>(), second.const_data_ptr<S>(), factors.const_data_ptr<double>(),
                        a.size(1), a.size(2), b.size(1)};
    forward<T>(w, groups, a.size(0), from.const_data_ptr<S>(), rows.const_data_ptr<S>(), out.mutable_data_ptr<S>());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_add_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scaling,
    const at::Tensor& adapters, bool need_x, bool need_a, bool need_b) {
  check("lora_add_backward", grad, x, a, b, scaling, adapters);
  const at::Tensor g = grad.contiguous(), rows = x.contiguous(), first = a.contiguous(), second = b.contiguous();
  const at::Tensor factors = scaling.to(at::kDouble).contiguous(), ids = adapters.contiguous();
  const Groups groups(ids, a.size(0));
  const auto dtype = x.scalar_type(), upcast = dtypes::upcast(dtype);
  const auto none = [&] { return at::empty({0}, x.options()); };
  at::Tensor dx = need_x ? at::zeros(x.sizes(), x.options()) : none();
  at::Tensor da = need_a ? at::zeros(a.sizes(), a.options().dtype(upcast)) : none();
  at::Tensor db = need_b ? at::zeros(b.sizes(), b.options().dtype(upcast)) : none();
  dtypes::with_types(dtype, [&](auto compute, auto stored) {
    using T = decltype(compute);
    using S = decltype(stored);
    const Adapters<S> w{first.const_data_ptr<S>(), second.const_data_ptr<S>(), factors.const_data_ptr<double>(),
                        a.size(1), a.size(2), b.size(1)};
    Backward<T, S> backward{w, groups.order.data(), g.const_data_ptr<S>(), rows.const_data_ptr<S>(),
                            need_x ? dx.mutable_data_ptr<S>() : nullptr, need_a ? da.mutable_data_ptr<T>() : nullptr,
                            need_b ? db.mutable_data_ptr<T>() : nullptr, {}, {}, {}, {}};
    for (int64_t l = 0; l < a.size(0); ++l)
      for (int64_t t = groups.start[l]; t < groups.start[l + 1]; t += kSummed)
        backward.run({l, t, std::min(t + kSummed, groups.start[l + 1])}, t > groups.start[l]);
  });
  return {dx, da.to(a.scalar_type()), db.to(b.scalar_type())};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("lora_add", &lora_add);
  m.impl("lora_add_backward", &lora_add_backward);
}

}  // namespace toolkit::lora_linear_op
