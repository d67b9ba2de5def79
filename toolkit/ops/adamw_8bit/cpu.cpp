// AdamW with moments in 8 bits: one pass over a block of 256 elements, whose moments stay near the core.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "rows.h"
#include "threads.h"

namespace toolkit::adamw_8bit_op {

using at::Tensor;

constexpr int64_t kBlock = 256;
constexpr int64_t kGrain = 64;    // blocks that repay waking a thread
constexpr int kShift = 16;        // a bin is a float's exponent and the first 7 bits of its mantissa
constexpr uint32_t kFirst = 103;  // exponent of 2^-24, below the first threshold of either map

using Floats = at::vec::Vectorized<float>;
using Ints = at::vec::Vectorized<int32_t>;
constexpr int64_t kLanes = Floats::size();
static_assert(kBlock % kLanes == 0);

// How many thresholds lie below a number of [0, 1]: a bin of floats holds one threshold at most, for neighbouring
// values of a decade are more than a 128th of its numbers apart.
class Nearest {
 public:
  Nearest(const Tensor& thresholds) {
    const int64_t count = thresholds.numel();
    const float* const values = thresholds.const_data_ptr<float>();
    std::copy_n(values, count, thresholds_.begin());
    thresholds_[count] = std::numeric_limits<float>::infinity();
    int64_t below = 0;
    for (int32_t bin = 0; bin < kBins; ++bin) {
      const uint32_t bits = (kFirst << 23) + (uint32_t(bin) << kShift);
      float begin;
      std::memcpy(&begin, &bits, sizeof(begin));
      while (below < count && values[below] < begin) ++below;
      below_[bin] = below;
    }
  }
  Floats count(Floats magnitude) const {
    const Ints bits = at::vec::cast<int32_t>(magnitude);
    const Ints bin = at::vec::minimum(at::vec::maximum((bits >> Ints(kShift)) - Ints(kOffset), Ints(0)), Ints(kBins - 1));
    const Floats below = at::vec::gather<4>(below_.data(), bin);
    const Floats threshold = at::vec::gather<4>(thresholds_.data(), at::vec::convert_to_int_of_same_size(below));
    return below + ((magnitude > threshold) & Floats(1));
  }

 private:
  static constexpr int32_t kOffset = kFirst << (23 - kShift);
  static constexpr int32_t kBins = ((127 - kFirst) << (23 - kShift)) + 1;  // up to 1
  std::array<float, 257> thresholds_;
  std::array<float, kBins> below_;
};

struct Moment {
  uint8_t* codes;
  float* scales;
  const float* map;
  Nearest nearest;
  bool is_signed;

  // A block's values; those past `count` are 0, for the block is computed whole.
  void read(int64_t block, int64_t count, float* out) const {
    const uint8_t* const from = codes + block * kBlock;
    int32_t code[kBlock];
    for (int64_t i = 0; i < count; ++i) code[i] = from[i];
    std::fill(code + count, code + kBlock, is_signed ? kZero : 0);
    for (int64_t i = 0; i < kBlock; i += kLanes)
      (at::vec::gather<4>(map, Ints::loadu(code + i)) * Floats(scales[block])).store(out + i);
  }
  void write(int64_t block, int64_t count, const float* values) const {
    const float largest = rows::largest(magnitudes(values).data(), count);
    scales[block] = largest;
    const Floats divisor(largest > 0 ? largest : std::numeric_limits<float>::infinity());
    int32_t code[kBlock];
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Floats share = Floats::loadu(values + i) / divisor;
      Floats steps = nearest.count(share.abs());
      if (is_signed)
        steps = Floats(kZero) + Floats::blendv(steps, at::vec::minimum(steps, Floats(kZero)).neg(), share < Floats(0));
      else  // above 0 stays above 0
        steps = at::vec::maximum(steps, (share > Floats(0)) & Floats(1));
      at::vec::convert_to_int_of_same_size(steps).store(code + i);
    }
    uint8_t* const to = codes + block * kBlock;
    for (int64_t i = 0; i < count; ++i) to[i] = code[i];
  }

 private:
  static constexpr int32_t kZero = 127;  // code of 0 in the signed map

  static std::array<float, kBlock> magnitudes(const float* values) {
    std::array<float, kBlock> found;
    for (int64_t i = 0; i < kBlock; i += kLanes) Floats::loadu(values + i).abs().store(found.data() + i);
    return found;
  }
};

void adamw_8bit(const Tensor& weight, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_scale,
                const Tensor& exp_avg_sq, const Tensor& exp_avg_sq_scale, double lr, double beta1, double beta2,
                double eps, double weight_decay, int64_t step, const Tensor& signed_map,
                const Tensor& signed_thresholds, const Tensor& map, const Tensor& thresholds) {
  const Moment mean{exp_avg.mutable_data_ptr<uint8_t>(), exp_avg_scale.mutable_data_ptr<float>(),
                    signed_map.const_data_ptr<float>(), Nearest(signed_thresholds), true};
  const Moment square{exp_avg_sq.mutable_data_ptr<uint8_t>(), exp_avg_sq_scale.mutable_data_ptr<float>(),
                      map.const_data_ptr<float>(), Nearest(thresholds), false};
  float* const w = weight.mutable_data_ptr<float>();
  const float* const g = grad.const_data_ptr<float>();
  const float keep1 = beta1, add1 = 1 - beta1, keep2 = beta2, add2 = 1 - beta2, decay = 1 - lr * weight_decay;
  const float rate = lr / (1 - std::pow(beta1, double(step))), correction = 1 / std::sqrt(1 - std::pow(beta2, double(step)));
  const float least = eps;
  const int64_t numel = weight.numel();
  threads::parallel_for(0, (numel + kBlock - 1) / kBlock, kGrain, [&](int64_t begin, int64_t end) {
    float m[kBlock], v[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, numel - first);
      mean.read(block, count, m);
      square.read(block, count, v);
      for (int64_t i = 0; i < count; ++i) {
        const float d = g[first + i];
        m[i] = m[i] * keep1 + d * add1;
        v[i] = v[i] * keep2 + (d * d) * add2;
        w[first + i] = w[first + i] * decay - m[i] / (std::sqrt(v[i]) * correction + least) * rate;
      }
      mean.write(block, count, m);
      square.write(block, count, v);
    }
  });
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("adamw_8bit", &adamw_8bit); }

}  // namespace toolkit::adamw_8bit_op
