// linear_cross_entropy on CPU: the logits of a chunk of rows, from which its losses and its share of every gradient are
// taken. Rows that count for nothing are left out of all GEMMs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "head.h"
#include "softmax.h"

namespace toolkit::linear_cross_entropy_op {

using namespace toolkit::rows;
using head::kPad;
using head::kTileRows;
using softmax::kBlock;
using softmax::Partial;

constexpr int64_t kLeastRows = 384;  // rows of a chunk: the gradient of the weight is passed over once a chunk

// Rows whose logits are held together: about as many numbers as the hidden states, in chunks of like heights.
int64_t chunk_rows(int64_t rows, int64_t depth, int64_t vocabulary) {
  const int64_t most = std::max(kLeastRows, rows * depth / vocabulary);
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::min(rows, ((rows + chunks - 1) / chunks + kTileRows - 1) / kTileRows * kTileRows);
}

// One chunk: exponentials of its logits by block of the vocabulary, later the gradients to its logits, as operands of
// the GEMMs that follow.
template <typename E, typename S>
struct Chunk {
  using T = gemm::Sum<E>;
  using Operand = gemm::Operand<E>;
  const head::Head<E, S>& in;
  const int64_t *target, *row_of;  // of every row given; the rows that count
  const T* row_weight;
  T* values;           // [height or more, stride]
  Operand* gradients;  // the same, or `values`
  int64_t first, height, stride;

  int64_t vocabulary() const { return in.weight.size(0); }
  int64_t blocks() const { return (vocabulary() + kBlock - 1) / kBlock; }

  // body(first row, end, block, first column, columns) over the tiles of the chunk.
  template <typename Body>
  void for_tiles(const Body& body) const {
    const int64_t tiles = (height + kTileRows - 1) / kTileRows;
    threads::run_tasks(tiles * blocks(), at::get_num_threads(), [&](int64_t task) {
      const int64_t row = task % tiles * kTileRows, block = task / tiles, column = block * kBlock;
      body(row, std::min(row + kTileRows, height), block, column, std::min(kBlock, vocabulary() - column));
    });
  }

  // Log-probabilities of the targets, and for every block the factor from its exponentials to weighted probabilities.
  void forward(T* logprob, std::vector<T>& factors) const {
    std::vector<Partial> parts(height * blocks());
    std::vector<T> own(height);
    for_tiles([&](int64_t row, int64_t end, int64_t block, int64_t column, int64_t n) {
      in.multiply(first + row, end - row, column, n, values + row * stride + column, stride);
      for (int64_t r = row; r < end; ++r) {
        T* const z = values + r * stride + column;
        const int64_t at = target[row_of[first + r]] - column;
        if (at >= 0 && at < n) own[r] = z[at];
        parts[r * blocks() + block] = softmax::block_partial<T, false, true>(z, n, z);
      }
    });
    factors.resize(height * blocks());
    for_rows(height, blocks() * 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Partial* const part = parts.data() + r * blocks();
        const Partial all = softmax::join(part, blocks());
        const int64_t row = row_of[first + r];
        logprob[row] = static_cast<T>((own[r] - all.max) - std::log(all.sum));
        for (int64_t b = 0; b < blocks(); ++b) {
          const double lag = part[b].max == all.max ? 1.0 : std::exp(part[b].max - all.max);
          factors[r * blocks() + b] = static_cast<T>(row_weight[row] * (lag / all.sum));
        }
      }
    });
  }

  // d z = w (p - onehot).
  void differentiate(const std::vector<T>& factors) const {
    for_tiles([&](int64_t row, int64_t end, int64_t block, int64_t column, int64_t n) {
      for (int64_t r = row; r < end; ++r) {
        T* const z = values + r * stride + column;
        const Vec<T> factor(factors[r * blocks() + block]);
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          (Vec<T>::loadu(z + i, lanes) * factor).store(z + i, lanes);
        });
        const int64_t source = row_of[first + r], at = target[source] - column;
        if (at >= 0 && at < n) z[at] -= row_weight[source];
        if constexpr (!std::is_same_v<T, Operand>) storage::write_row(z, n, gradients + r * stride + column);
      }
    });
  }

  // The chunk's share of d hidden and d weight, by block of the vocabulary.
  void add_products(const Tensor& dh, const Tensor& dw) const {
    const int64_t depth = in.weight.size(1);
    for (int64_t column = 0; column < vocabulary(); column += kBlock) {
      const int64_t n = std::min(kBlock, vocabulary() - column);
      const Operand* const dz = gradients + column;
      if (dh.numel() > 0)
        in.gradient_to_hidden(dz, stride, height, column, n, dh.mutable_data_ptr<T>() + first * depth, column > 0);
      if (dw.numel() > 0)
        in.gradient_to_weight(dz, stride, first, height, n, dw.mutable_data_ptr<T>() + column * depth, first > 0);
    }
  }
};

// (sum of losses, then gradients in the type of the arithmetic; empty where one is not needed)
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight,
                                                   const std::optional<Tensor>& bias, const Tensor& targets_given,
                                                   const std::optional<Tensor>& row_weights_given, bool need_hidden,
                                                   bool need_weight, bool need_bias) {
  head::check("linear_cross_entropy", hidden, weight, bias, targets_given);
  TORCH_CHECK(targets_given.dim() == 1, "linear_cross_entropy: targets must have shape [T], got ",
              targets_given.sizes(), ".");
  TORCH_CHECK(!row_weights_given || row_weights_given->sizes() == targets_given.sizes(),
              "linear_cross_entropy: row_weights must have shape [", hidden.size(0), "].");
  const auto type = compute_type(hidden, "linear_cross_entropy");
  const auto options = hidden.options().dtype(type);
  const int64_t vocabulary = weight.size(0), depth = weight.size(1);
  const Tensor targets = targets_given.contiguous();
  const Tensor row_weights =
      row_weights_given ? row_weights_given->to(type).contiguous() : at::ones(targets.sizes(), options);
  const bool biased = need_bias && bias.has_value();
  Tensor logprob = at::zeros(targets.sizes(), options), dh = at::empty({0}, options), dw = at::empty({0}, options);
  Tensor db = biased ? at::zeros({vocabulary}, options) : at::empty({0}, options);
  gemm::with_elements(hidden.scalar_type(), [&](auto element, auto stored) {
    using E = decltype(element);
    using T = gemm::Sum<E>;
    using S = decltype(stored);
    const int64_t* target = targets.const_data_ptr<int64_t>();
    const T* row_weight = row_weights.const_data_ptr<T>();
    std::vector<int64_t> counted;
    for (int64_t r = 0; r < hidden.size(0); ++r)
      if (target[r] >= 0 && row_weight[r] != T(0)) counted.push_back(r);
    const int64_t rows = counted.size();
    const bool all = rows == hidden.size(0);
    const Tensor index = at::tensor(counted, at::kLong);
    const head::Head<E, S> in(all ? hidden : hidden.index_select(0, index), weight, bias);
    if (need_hidden) dh = memory::empty({rows, depth}, options);
    // The first chunk writes it whole.
    if (need_weight) dw = rows > 0 ? memory::empty(weight.sizes(), options) : at::zeros(weight.sizes(), options);
    const int64_t height = chunk_rows(rows, depth, vocabulary), stride = (vocabulary + kPad - 1) / kPad * kPad + kPad;
    const Tensor buffer = memory::empty({height, stride}, options);
    const auto operand = gemm::operand_type(hidden.scalar_type());
    const Tensor gradients = operand == type ? buffer : memory::empty({height, stride}, options.dtype(operand));
    std::vector<T> factors;
    for (int64_t first = 0; first < rows; first += height) {
      const Chunk<E, S> chunk{in, target, counted.data(), row_weight, buffer.mutable_data_ptr<T>(),
                              gradients.mutable_data_ptr<gemm::Operand<E>>(), first, std::min(height, rows - first),
                              stride};
      chunk.forward(logprob.mutable_data_ptr<T>(), factors);
      if (need_hidden || need_weight || biased) chunk.differentiate(factors);
      chunk.add_products(dh, dw);
      if (biased) in.gradient_to_bias(chunk.gradients, stride, chunk.height, vocabulary, db.mutable_data_ptr<T>());
    }
    if (need_hidden && !all) dh = at::zeros(hidden.sizes(), options).index_copy_(0, index, dh);
  });
  return {(row_weights_given ? at::mul(logprob, row_weights) : logprob).sum().neg(), dh, dw, db};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("linear_cross_entropy", &forward); }

}  // namespace toolkit::linear_cross_entropy_op
