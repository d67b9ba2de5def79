// linear_logprob on CPU: logits live in one tile of rows x one block of the vocabulary a thread, forward, and in one
// block of the vocabulary backward, never all at once.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "head.h"
#include "softmax.h"

namespace toolkit::linear_logprob_op {

using namespace toolkit::rows;
using head::kPad;
using head::kTileRows;
using softmax::kBlock;
using softmax::Partial;

constexpr int64_t kTopTasks = 4;          // tasks a thread that top-k lists are split for, at most
constexpr int64_t kBackwardBlock = 1024;  // columns of the vocabulary whose gradient is held at a time
constexpr int64_t kBackwardRows = 4096;   // and rows

struct Options {
  double scale, softcap;
  int64_t top_k;
};

// One row of the GEMM to logits, in place: scaled, capped, tempered.
template <typename T>
void finish_logits(T* z, int64_t n, const Options& o, const T* temperature) {
  const bool scaled = o.scale != 1.0, capped = o.softcap > 0.0;
  if (!scaled && !capped && temperature == nullptr) return;
  const Vec<T> scale(o.scale), cap(o.softcap), divisor(temperature == nullptr ? T(1) : *temperature);
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
    auto v = Vec<T>::loadu(z + i, lanes);
    if (scaled) v = v * scale;
    if (capped) v = (v / cap).tanh() * cap;
    if (temperature != nullptr) v = v / divisor;
    v.store(z + i, lanes);
  });
}

// The `count` largest of z in descending order, equal ones in order of ids, merged into the list that came before it.
template <typename T>
void select_top(const T* z, int64_t n, int64_t first_id, T* values, int64_t* ids, int64_t count) {
  for (int64_t i = 0; i < n; ++i) {
    if (!(z[i] > values[count - 1])) continue;
    int64_t at = count - 1;
    for (; at > 0 && z[i] > values[at - 1]; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = z[i];
    ids[at] = first_id + i;
  }
}

template <typename E, typename S>
struct Inputs : head::Head<E, S> {
  using T = gemm::Sum<E>;
  Inputs(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
         const std::optional<Tensor>& temperature_given, at::ScalarType type)
      : head::Head<E, S>(hidden, weight, bias),
        temperature(temperature_given ? temperature_given->to(type).contiguous() : Tensor()) {}

  const T* temperature_of(int64_t row) const {
    return temperature.defined() ? temperature.const_data_ptr<T>() + row : nullptr;
  }

  Tensor temperature;
};

void check(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets,
           const std::optional<Tensor>& temperature) {
  head::check("linear_logprob", hidden, weight, bias, targets);
  TORCH_CHECK(targets.dim() == 2, "linear_logprob: targets must have shape [T, C], got ", targets.sizes(), ".");
  TORCH_CHECK(!temperature || temperature->numel() == hidden.size(0), "linear_logprob: temperature must have shape [",
              hidden.size(0), "].");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets_given,
    const std::optional<Tensor>& temperature, double scale, double softcap, int64_t top_k) {
  check(hidden, weight, bias, targets_given, temperature);
  const auto type = compute_type(hidden, "linear_logprob");
  const Options options{scale, softcap, top_k};
  const Tensor targets = targets_given.contiguous();
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0), choices = targets.size(1);
  TORCH_CHECK(top_k >= 0 && top_k <= vocabulary, "linear_logprob: top_k must be 0 to ", vocabulary, ", got ", top_k,
              ".");
  const int64_t* target = targets.const_data_ptr<int64_t>();
  Tensor logprob = empty(targets.sizes(), hidden, type), lse = empty({rows}, hidden, type);
  Tensor entropy = empty({rows}, hidden, type), mean = empty({rows}, hidden, type);
  Tensor top_values = empty({rows, top_k}, hidden, type), top_ids = empty({rows, top_k}, hidden, at::kLong);
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t most = top_k == 0 ? blocks : tiles >= kTopTasks * at::get_num_threads() ? 1
                                                  : kTopTasks * at::get_num_threads();
  const int64_t per_chunk = (blocks + std::min(blocks, most) - 1) / std::min(blocks, most);
  const int64_t chunks = (blocks + per_chunk - 1) / per_chunk;
  std::vector<Partial> parts(rows * blocks);
  gemm::with_elements(hidden.scalar_type(), [&](auto element, auto stored) {
    using T = gemm::Sum<decltype(element)>;
    const Inputs<decltype(element), decltype(stored)> in(hidden, weight, bias, temperature, type);
    const bool listed = top_k > 0;
    std::vector<T> list_values(rows * chunks * top_k, -std::numeric_limits<T>::infinity());
    std::vector<int64_t> list_ids(rows * chunks * top_k, 0);
    std::vector<T> own(rows * choices, T(0));
    threads::run_tasks(tiles * chunks, at::get_num_threads(), [&](int64_t task) {
      const int64_t chunk = task / tiles, row = task % tiles * kTileRows, count = std::min(kTileRows, rows - row);
      constexpr int64_t stride = kBlock + kPad;
      T* const logits = threads::scratch<T, 1>(count * stride);
      for (int64_t b = chunk * per_chunk; b < std::min((chunk + 1) * per_chunk, blocks); ++b) {
        const int64_t column = b * kBlock, n = std::min(kBlock, vocabulary - column);
        in.multiply(row, count, column, n, logits, stride);
        for (int64_t r = 0; r < count; ++r) {
          T* const z = logits + r * stride;
          finish_logits(z, n, options, in.temperature_of(row + r));
          parts[(row + r) * blocks + b] = softmax::block_partial<T, true>(z, n);
          for (int64_t c = (row + r) * choices; c < (row + r + 1) * choices; ++c)
            if (target[c] >= column && target[c] < column + n) own[c] = z[target[c] - column];
          const int64_t list = ((row + r) * chunks + chunk) * top_k;
          if (listed) select_top(z, n, column, &list_values[list], &list_ids[list], top_k);
        }
      }
    });
    T *to_logprob = logprob.mutable_data_ptr<T>(), *to_lse = lse.mutable_data_ptr<T>();
    T *to_entropy = entropy.mutable_data_ptr<T>(), *to_mean = mean.mutable_data_ptr<T>();
    T* to_values = top_values.mutable_data_ptr<T>();
    int64_t* to_ids = top_ids.mutable_data_ptr<int64_t>();
    for_rows(rows, blocks * 16 + choices + chunks * top_k * 4, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Partial all = softmax::join(parts.data() + r * blocks, blocks);
        const double log_sum = std::log(all.sum);
        to_lse[r] = static_cast<T>(all.max + log_sum);
        to_entropy[r] = static_cast<T>(log_sum - all.moment / all.sum);
        to_mean[r] = static_cast<T>(all.total / vocabulary);
        for (int64_t c = r * choices; c < (r + 1) * choices; ++c)
          to_logprob[c] = target[c] < 0 ? T(0) : static_cast<T>((own[c] - all.max) - log_sum);
        if (!listed) continue;
        std::fill_n(to_values + r * top_k, top_k, -std::numeric_limits<T>::infinity());
        std::fill_n(to_ids + r * top_k, top_k, int64_t(0));
        for (int64_t at = r * chunks * top_k; at < (r + 1) * chunks * top_k; ++at) {
          T* const values = to_values + r * top_k;
          int64_t* const ids = to_ids + r * top_k;
          if (!(list_values[at] > values[top_k - 1])) continue;
          select_top(&list_values[at], 1, list_ids[at], values, ids, top_k);
        }
      }
    });
  });
  return {logprob, lse, entropy, mean, top_values, top_ids};
}

// What a row's gradient is made of: d z = p (common - of_entropy (log p + H)) + of_mean / V + its targets' own.
template <typename T>
struct RowGradient {
  T common, of_entropy, of_mean, lse, entropy;
};

// One row of logits [n] to the gradient of its GEMM, in place.
template <typename T>
void logits_gradient(T* z, int64_t n, int64_t column, const RowGradient<T>& g, const int64_t* target, const T* of_target,
                     int64_t choices, const Options& o, const T* temperature) {
  const Vec<T> common(g.common), of_entropy(g.of_entropy), of_mean(g.of_mean), lse(g.lse), entropy(g.entropy);
  const bool with_entropy = g.of_entropy != T(0), plain = o.softcap <= 0.0;
  const T divisor = temperature == nullptr ? T(1) : *temperature;
  const Vec<T> outer(static_cast<T>(o.scale) / divisor), to_cap(plain ? T(0) : divisor / static_cast<T>(o.softcap));
  // The derivative of the cap at the targets, before their logits are overwritten.
  auto slope = [&](T value) {
    const T t = plain ? T(0) : value * divisor / static_cast<T>(o.softcap);
    return (T(1) - t * t) * (static_cast<T>(o.scale) / divisor);
  };
  T kept[16];
  std::vector<T> more(choices > 16 ? choices : 0);
  T* const own = choices > 16 ? more.data() : kept;
  for (int64_t c = 0; c < choices; ++c) {
    const bool here = target[c] >= column && target[c] < column + n;
    own[c] = here ? of_target[c] * slope(z[target[c] - column]) : T(0);
  }
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
    const auto v = Vec<T>::loadu(z + i, lanes), log_p = v - lse;
    auto weight = common;
    if (with_entropy) weight = weight - of_entropy * (at::vec::clamp_min(log_p, Vec<T>(-1e4)) + entropy);
    auto d = at::vec::fmadd(elementary::exp(log_p), weight, of_mean);
    if (!plain) {
      const auto t = v * to_cap;
      d = d * (Vec<T>(1) - t * t);
    }
    (d * outer).store(z + i, lanes);
  });
  for (int64_t c = 0; c < choices; ++c)
    if (target[c] >= column && target[c] < column + n) z[target[c] - column] += own[c];
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_logprob, const Tensor& grad_lse, const Tensor& grad_entropy, const Tensor& grad_mean,
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets_given,
    const std::optional<Tensor>& temperature, const Tensor& lse, const Tensor& entropy, double scale, double softcap,
    bool need_hidden, bool need_weight, bool need_bias) {
  check(hidden, weight, bias, targets_given, temperature);
  const auto type = compute_type(hidden, "linear_logprob_backward");
  const Options options{scale, softcap, 0};
  const int64_t vocabulary = weight.size(0), depth = weight.size(1), choices = targets_given.size(1);
  auto upcast = [&](const Tensor& x) { return x.to(type).contiguous(); };
  const Tensor targets = targets_given.contiguous();
  Tensor dh, dw, db;
  gemm::with_elements(hidden.scalar_type(), [&](auto element, auto stored) {
    using E = decltype(element);
    using T = gemm::Sum<E>;
    using Operand = gemm::Operand<E>;
    using S = decltype(stored);
    const Tensor of_logprob = upcast(grad_logprob), of_lse = upcast(grad_lse), of_entropy = upcast(grad_entropy);
    const Tensor of_mean = upcast(grad_mean), log_sum = upcast(lse), entropy_rows = upcast(entropy);
    const int64_t* target = targets.const_data_ptr<int64_t>();
    const T* of_target = of_logprob.const_data_ptr<T>();
    std::vector<RowGradient<T>> gradients;
    std::vector<int64_t> active;  // rows that pass any gradient: a masked prompt costs nothing
    for (int64_t r = 0; r < hidden.size(0); ++r) {
      RowGradient<T> g{of_lse.const_data_ptr<T>()[r], of_entropy.const_data_ptr<T>()[r],
                       of_mean.const_data_ptr<T>()[r] / static_cast<T>(vocabulary), log_sum.const_data_ptr<T>()[r],
                       entropy_rows.const_data_ptr<T>()[r]};
      bool any = g.common != T(0) || g.of_entropy != T(0) || g.of_mean != T(0);
      for (int64_t c = r * choices; c < (r + 1) * choices; ++c)
        if (target[c] >= 0) {
          g.common -= of_target[c];
          any = any || of_target[c] != T(0);
        }
      if (!any) continue;
      active.push_back(r);
      gradients.push_back(g);
    }
    const int64_t rows = active.size();
    const bool all = rows == hidden.size(0);
    const Tensor index = at::tensor(active, at::kLong);
    const Inputs<E, S> in(all ? hidden : hidden.index_select(0, index), weight, bias,
                          temperature && !all ? temperature->reshape(-1).index_select(0, index) : temperature, type);
    const auto wide_options = hidden.options().dtype(type);
    // Blocks are written whole by the first GEMM that adds to them: no zeros first, unless no row is there.
    Tensor dx = need_hidden ? memory::empty({rows, depth}, wide_options) : Tensor();
    if (need_weight) dw = rows > 0 ? memory::empty(weight.sizes(), weight.options()) : at::zeros(weight.sizes(), weight.options());
    if (need_bias) db = at::zeros({vocabulary}, wide_options);
    const int64_t stride = std::min(vocabulary, kBackwardBlock) + kPad;
    const int64_t most = std::min(rows, kBackwardRows);
    const Tensor buffer = memory::empty({most, stride}, wide_options);
    const auto operand = gemm::operand_type(hidden.scalar_type());
    const Tensor operands = operand == type ? buffer : memory::empty({most, stride}, wide_options.dtype(operand));
    Tensor sums;  // of a block of d weight that several blocks of rows add to, before it is rounded
    if (need_weight && rows > kBackwardRows && dw.scalar_type() != type)
      sums = at::empty({std::min(vocabulary, kBackwardBlock), depth}, wide_options);
    for (int64_t column = 0; column < vocabulary && rows > 0; column += kBackwardBlock) {
      const int64_t n = std::min(kBackwardBlock, vocabulary - column);
      for (int64_t first = 0; first < rows; first += kBackwardRows) {
        const int64_t height = std::min(kBackwardRows, rows - first);
        T* const g = buffer.mutable_data_ptr<T>();
        Operand* const given = operands.mutable_data_ptr<Operand>();
        threads::run_tasks((height + kTileRows - 1) / kTileRows, at::get_num_threads(), [&](int64_t tile) {
          const int64_t row = tile * kTileRows, count = std::min(kTileRows, height - row);
          in.multiply(first + row, count, column, n, g + row * stride, stride);
          for (int64_t r = row; r < row + count; ++r) {
            const int64_t source = active[first + r];
            const T* const tempered = in.temperature_of(first + r);
            finish_logits(g + r * stride, n, options, tempered);
            logits_gradient(g + r * stride, n, column, gradients[first + r], target + source * choices,
                            of_target + source * choices, choices, options, tempered);
            if constexpr (!std::is_same_v<T, Operand>) storage::write_row(g + r * stride, n, given + r * stride);
          }
        });
        if (need_hidden)
          in.gradient_to_hidden(given, stride, height, column, n, dx.mutable_data_ptr<T>() + first * depth, column > 0);
        if (need_weight && sums.defined())
          in.gradient_to_weight(given, stride, first, height, n, sums.mutable_data_ptr<T>(), first > 0);
        else if (need_weight)
          in.gradient_to_weight(given, stride, first, height, n, dw.mutable_data_ptr<S>() + column * depth, first > 0);
        if (need_bias) in.gradient_to_bias(given, stride, height, n, db.mutable_data_ptr<T>() + column);
      }
      if (sums.defined()) dw.narrow(0, column, n).copy_(sums.narrow(0, 0, n));
    }
    if (need_hidden) {
      dh = all ? cast(dx, hidden.scalar_type())
               : at::zeros(hidden.sizes(), hidden.options()).index_copy_(0, index, cast(dx, hidden.scalar_type()));
    }
  });
  const Tensor none = at::empty({0}, hidden.options());
  return {need_hidden ? dh : none, need_weight ? dw : none, need_bias ? cast(db, bias->scalar_type()) : none};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("linear_logprob", &forward);
  m.impl("linear_logprob_backward", &backward);
}

}  // namespace toolkit::linear_logprob_op
