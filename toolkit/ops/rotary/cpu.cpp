// rotary and rotary_tables on CPU.
#include "rotate.h"
#include "rows.h"

namespace toolkit::rotary_op {

using namespace toolkit::rows;

Tensor forward(const Tensor& input, const Tensor& cos, const Tensor& sin, bool interleaved) {
  TORCH_CHECK(input.dim() == 3, "rotary: x must have shape [T, H, D], got ", input.sizes(), ".");
  const int64_t tokens = input.size(0), heads = input.size(1), width = input.size(2);
  TORCH_CHECK(cos.dim() == 2 && cos.size(0) == tokens && cos.size(1) <= width && cos.size(1) % 2 == 0,
              "rotary: cos has shape ", cos.sizes(), "; x of shape ", input.sizes(), " needs [", tokens,
              ", R], R even and at most ", width, ".");
  check_equal_shapes("rotary", "sin", sin, "cos", cos);
  const auto type = compute_type(input, "rotary");
  const Tensor x = width > 1 && input.stride(2) != 1 ? input.contiguous() : input;
  const Matrix c(cos, type), s(sin, type);
  Tensor out = empty(input.sizes(), input, input.scalar_type());
  const int64_t token_stride = x.stride(0), head_stride = x.stride(1);
  dtypes::with_types(input.scalar_type(), [&](auto zero, auto stored) {
    using T = decltype(zero);
    using S = decltype(stored);
    const S* from = x.const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    const auto turn = [&](const T* row, int64_t t, T* result) {
      if (interleaved) {
        rotate<T, true>(row, c.row<T>(t), s.row<T>(t), c.width, width, result);
      } else {
        rotate<T, false>(row, c.row<T>(t), s.row<T>(t), c.width, width, result);
      }
    };
    for_rows(tokens, heads * width, [&](int64_t begin, int64_t end) {
      T* const work = threads::scratch<T, 1>(2 * width);
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          const S* row = from + t * token_stride + h * head_stride;
          S* result = to + (t * heads + h) * width;
          if constexpr (std::is_same_v<T, S>) {
            turn(row, t, result);
          } else {
            storage::read_row(row, width, work);
            turn(work, t, work + width);
            storage::write_row(work + width, width, result);
          }
        }
      }
    });
  });
  return out;
}

// The angle is rounded to float (as models are trained with), its cosine and sine are taken in double. With axes,
// frequency i takes the position on axes[i]; the positions of an axis are `count` apart.
template <typename T>
void fill_tables(const int64_t* positions, const int64_t* axes, int64_t count, const T* frequency, int64_t n,
                 double scaling, T* cos, T* sin) {
  threads::parallel_for(0, count, std::max<int64_t>(1, 1024 / std::max<int64_t>(1, n)), [&](int64_t begin, int64_t end) {
    constexpr int64_t kLanes = Vec<double>::size();
    for (int64_t t = begin; t < end; ++t) {
      T *c = cos + t * 2 * n, *s = sin + t * 2 * n;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t lanes = std::min(kLanes, n - i);
        double angle[kLanes] = {}, cosine[kLanes], sine[kLanes];
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t at = axes ? axes[i + l] * count + t : t;
          angle[l] = static_cast<T>(positions[at]) * frequency[i + l];
        }
        const auto angles = Vec<double>::loadu(angle);
        angles.cos().store(cosine);
        angles.sin().store(sine);
        for (int64_t l = 0; l < lanes; ++l) {
          c[i + l] = c[n + i + l] = static_cast<T>(static_cast<T>(cosine[l]) * static_cast<T>(scaling));
          s[i + l] = s[n + i + l] = static_cast<T>(static_cast<T>(sine[l]) * static_cast<T>(scaling));
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> tables(const Tensor& positions, const Tensor& inv_freq, double scaling,
                                  at::ScalarType dtype, const std::optional<Tensor>& axes) {
  TORCH_CHECK(positions.scalar_type() == at::kLong, "rotary_tables: positions must have dtype int64, got ",
              positions.scalar_type(), ".");
  TORCH_CHECK(inv_freq.dim() == 1, "rotary_tables: inv_freq must have shape [F], got ", inv_freq.sizes(), ".");
  const auto type = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor at_positions = positions.contiguous(), frequencies = inv_freq.to(type).contiguous();
  const int64_t n = inv_freq.size(0);
  auto sizes = positions.sizes().vec();
  int64_t count = positions.numel();
  Tensor axis;
  if (axes) {
    TORCH_CHECK(axes->scalar_type() == at::kLong && axes->dim() == 1 && axes->size(0) == n,
                "rotary_tables: axes must have dtype int64 [", n, "], got ", axes->scalar_type(), " and shape ",
                axes->sizes(), ".");
    TORCH_CHECK(positions.dim() > 0, "rotary_tables: positions have no dimensions; with axes, [A, ...] is required.");
    axis = axes->contiguous();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t a = axis.const_data_ptr<int64_t>()[i];
      TORCH_CHECK(a >= 0 && a < sizes[0], "rotary_tables: axes[", i, "] is ", a, "; positions have ", sizes[0],
                  " axes.");
    }
    count = sizes[0] ? count / sizes[0] : 0;
    sizes.erase(sizes.begin());
  }
  sizes.push_back(2 * n);
  Tensor cos = empty(sizes, inv_freq, type), sin = empty(sizes, inv_freq, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    fill_tables<T>(at_positions.const_data_ptr<int64_t>(), axes ? axis.const_data_ptr<int64_t>() : nullptr, count,
                   frequencies.const_data_ptr<T>(), n, scaling, cos.mutable_data_ptr<T>(), sin.mutable_data_ptr<T>());
  });
  return {cast(cos, dtype), cast(sin, dtype)};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("rotary", &forward);
  m.impl("rotary_tables", &tables);
}

}  // namespace toolkit::rotary_op
