// A language model's head, a tile of rows x columns of the vocabulary at a time.
#pragma once
#include "outer.h"
#include "rows.h"

namespace toolkit::head {

using at::Tensor;
using storage::cast;

constexpr int64_t kTileRows = 96;  // logits of a tile: 96 x 2048 floats stay near a core
constexpr int64_t kPad = 16;       // columns between rows: rows 4 KiB apart would share a few sets of the caches

// hidden [T, K], weight [V, K] of one dtype, bias [V], targets [T, ...] below V.
inline void check(const char* op, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                  const Tensor& targets) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0, op,
              ": hidden and weight must have shapes [T, K] and [V, K] with V >= 1, got ", hidden.sizes(),
              " and weight ", weight.sizes(), ".");
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), op, ": hidden and weight must have the same dtype, got ",
              hidden.scalar_type(), " and ", weight.scalar_type(), ".");
  TORCH_CHECK(!bias || bias->numel() == weight.size(0), op, ": bias must have shape [", weight.size(0), "].");
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.dim() > 0 && targets.size(0) == hidden.size(0), op,
              ": targets must have dtype int64 and ", hidden.size(0), " rows, got ", targets.scalar_type(),
              " and shape ", targets.sizes(), ".");
  const Tensor flat = targets.contiguous();
  const int64_t* target = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i)
    TORCH_CHECK_INDEX(target[i] < weight.size(0), op, ": target ", target[i], " is not below the vocabulary size ",
                      weight.size(0), ".");
}

// Of elements T (pairs.h) and weights that are stored as S.
template <typename T, typename S>
struct Head {
  using F = gemm::Sum<T>;
  using Operand = gemm::Operand<T>;

  Head(const Tensor& hidden_given, const Tensor& weight_given, const std::optional<Tensor>& bias_given)
      : hidden(cast(hidden_given, gemm::operand_type(hidden_given.scalar_type())).contiguous()),
        weight(weight_given.size(1) > 1 && weight_given.stride(1) != 1 ? weight_given.contiguous() : weight_given),
        bias(bias_given ? cast(*bias_given, dtypes::upcast(hidden_given.scalar_type())).contiguous() : Tensor()) {}

  // Products of rows [row, row + count) with the weights of columns [column, column + n), to out [count, stride];
  // rounded to the dtype of the inputs, as a head's output is.
  void multiply(int64_t row, int64_t count, int64_t column, int64_t n, F* out, int64_t stride) const {
    const int64_t depth = weight.size(1);
    const F* shift = bias.defined() ? bias.const_data_ptr<F>() + column : nullptr;
    matmul::Problem<T, S> problem{hidden.const_data_ptr<Operand>() + row * depth,
                                  depth,
                                  weight.const_data_ptr<S>() + column * weight.stride(0),
                                  weight.stride(0),
                                  shift,
                                  out,
                                  stride,
                                  count,
                                  n,
                                  depth};
    if constexpr (std::is_same_v<F, S>) {
      matmul::compute(problem);
    } else {
      S* const rounded = threads::scratch<S, 4>(count * n);
      problem.out_stride = n;
      problem.rounded = rounded;
      matmul::compute(problem);
      for (int64_t r = 0; r < count; ++r) storage::read_row(rounded + r * n, n, out + r * stride);
    }
  }

  // dh[r, k] (+)= sum_v g[r, v] weight[column + v, k] for g [count, n] with rows `stride` apart, dh [count, K].
  void gradient_to_hidden(const Operand* g, int64_t stride, int64_t count, int64_t column, int64_t n, F* dh,
                          bool add) const {
    const int64_t depth = weight.size(1);
    const S* const from = weight.const_data_ptr<S>() + column * weight.stride(0);
    matmul::run(std::vector<matmul::Problem<T, S>>{
        {g, stride, from, weight.stride(0), nullptr, dh, depth, count, depth, n, add, nullptr, true}});
  }

  // dw[v, k] (+)= sum_r g[r, v] hidden[row + r, k] for dw [n, K]; without `add` it may be of type S, rounded.
  template <typename D>
  void gradient_to_weight(const Operand* g, int64_t stride, int64_t row, int64_t count, int64_t n, D* dw,
                          bool add) const {
    const int64_t depth = weight.size(1);
    matmul::Outer<T, S> outer{g, stride, nullptr, hidden.const_data_ptr<Operand>() + row * depth, depth,
                              nullptr, nullptr, depth, n, depth, count, add};
    matmul::write_to(outer, dw);
    matmul::run(std::vector{outer});
  }

  // db[v] += sum_r g[r, v], rows in ascending order.
  void gradient_to_bias(const Operand* g, int64_t stride, int64_t count, int64_t n, F* db) const {
    threads::parallel_for(0, n, std::max<int64_t>(1, rows::kGrain / count), [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t v = begin; v < end; ++v) db[v] += static_cast<F>(g[r * stride + v]);
    });
  }

  Tensor hidden, weight, bias;
};

}  // namespace toolkit::head
