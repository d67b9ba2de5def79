// token_logprob and its backward on CPU. The logits are read once each way and no softmax is stored.
#include "softmax.h"

namespace toolkit::token_logprob_op {

using namespace toolkit::rows;

using namespace toolkit::softmax;

constexpr int64_t kBlockGrain = 4;  // blocks that repay waking another thread

int64_t check(const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK(logits.dim() > 0 && logits.size(-1) > 0,
              "token_logprob: logits must have shape [..., V] with V >= 1, got ", logits.sizes(), ".");
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.sizes() == logits.sizes().slice(0, logits.dim() - 1),
              "token_logprob: targets have dtype ", targets.scalar_type(), " and shape ", targets.sizes(),
              "; logits of shape ", logits.sizes(), " need int64 and one target a row.");
  return logits.size(-1);
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& targets_given) {
  const int64_t width = check(logits, targets_given);
  const auto type = compute_type(logits, "token_logprob");
  const Matrix x(logits, type);
  const Tensor targets = targets_given.contiguous();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < x.count; ++r) {
    TORCH_CHECK_INDEX(target[r] < width, "token_logprob: target ", target[r], " is not below the vocabulary size ",
                      width, ".");
  }
  Tensor logprob = empty(targets.sizes(), logits, type), lse = empty(targets.sizes(), logits, type);
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  std::vector<Partial> parts(x.count * blocks);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T *to_logprob = logprob.mutable_data_ptr<T>(), *to_lse = lse.mutable_data_ptr<T>();
    threads::parallel_for(0, x.count * blocks, kBlockGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % blocks * kBlock;
        parts[i] = block_partial<T, false>(x.row<T>(i / blocks) + column, std::min(kBlock, width - column));
      }
    });
    for (int64_t r = 0; r < x.count; ++r) {
      const Partial all = join(parts.data() + r * blocks, blocks);
      const double max = all.max, log_sum = std::log(all.sum);
      to_lse[r] = static_cast<T>(max + log_sum);
      to_logprob[r] = target[r] < 0 ? T(0) : static_cast<T>((x.row<T>(r)[target[r]] - max) - log_sum);
    }
  });
  return {logprob, lse};
}

// d logits = g (onehot - softmax) + g_lse softmax = (g_lse - g) exp(x - lse) + g onehot, with g = 0 where ignored.
Tensor backward(const Tensor& grad_logprob, const Tensor& grad_lse, const Tensor& logits, const Tensor& targets_given,
                const Tensor& lse) {
  const int64_t width = check(logits, targets_given);
  check_equal_shapes("token_logprob_backward", "grad_logprob", grad_logprob, "targets", targets_given);
  check_equal_shapes("token_logprob_backward", "grad_lse", grad_lse, "targets", targets_given);
  check_equal_shapes("token_logprob_backward", "lse", lse, "targets", targets_given);
  const auto type = compute_type(logits, "token_logprob_backward");
  const Matrix x(logits, type);
  const Tensor targets = targets_given.contiguous(), log_sum = lse.to(type).contiguous();
  const Tensor of_logprob = grad_logprob.to(type).contiguous(), of_lse = grad_lse.to(type).contiguous();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  Tensor out = empty(logits.sizes(), logits, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T *g = of_logprob.const_data_ptr<T>(), *g_lse = of_lse.const_data_ptr<T>();
    const T* top = log_sum.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    threads::parallel_for(0, x.count * blocks, kBlockGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i / blocks, column = i % blocks * kBlock, n = std::min(kBlock, width - column);
        const T *from = x.row<T>(r) + column, own = target[r] < 0 ? T(0) : g[r], weight = g_lse[r] - own;
        T* to = result + r * width + column;
        if (weight == T(0)) {
          std::fill(to, to + n, T(0));
        } else {
          for_vectors<T>(n, [&](int64_t c, int64_t lanes) {
            const auto p = elementary::exp(Vec<T>::loadu(from + c, lanes) - Vec<T>(top[r]));
            (p * Vec<T>(weight)).store(to + c, lanes);
          });
        }
        if (target[r] >= column && target[r] < column + n) to[target[r] - column] += own;
      }
    });
  });
  return cast(out, logits.scalar_type());
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("token_logprob", &forward);
  m.impl("token_logprob_backward", &backward);
}

}  // namespace toolkit::token_logprob_op
