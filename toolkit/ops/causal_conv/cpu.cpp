// causal_conv, its backward and its paged form on CPU, a row at a time, vectors along the channels.
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "activation_kinds.h"
#include "dtypes.h"
#include "rows.h"

namespace toolkit::causal_conv_op {

using namespace toolkit::rows;

constexpr int64_t kMostTaps = 8;
constexpr int64_t kWeight = 4;  // the cost of an element against an add

struct None {
  template <typename V>
  static V value(const V& x) {
    return x;
  }
};

// body(T{}, function), function either None or silu's.
template <typename Body>
void with_kernel(at::ScalarType type, const std::optional<c10::string_view>& activation, const Body& body) {
  TORCH_CHECK(!activation || *activation == "silu", "causal_conv: activation must be None or 'silu', got '",
              activation.value_or(""), "'.");
  by_type(type, [&](auto zero) {
    if (activation) {
      body(zero, activations::Kind_silu{});
    } else {
      body(zero, None{});
    }
  });
}

const int64_t* indices(const char* name, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(x.sizes() == shape && x.scalar_type() == at::kLong && x.is_contiguous(), "causal_conv: ", name, " is ",
              x.scalar_type(), " of shape ", x.sizes(), "; contiguous int64 ", shape, " is required.");
  return x.const_data_ptr<int64_t>();
}

// A call: rows, parameters with the taps apart, and what lies before each segment, as pointers to rows.
struct Problem {
  Problem(const Tensor& input, const Tensor& weight_in, const std::optional<Tensor>& bias_in, const Tensor& offsets_in)
      : type(compute_type(input, "causal_conv")),
        x(input, type),
        weight(cast(weight_in, type).t().contiguous()),
        places(offsets_in.contiguous()),
        zeros(at::zeros({input.size(1)}, input.options().dtype(type))) {
    TORCH_CHECK(input.dim() == 2 && weight_in.dim() == 2 && weight_in.size(0) == input.size(1) &&
                    weight_in.size(1) >= 2 && weight_in.size(1) <= kMostTaps,
                "causal_conv: x has shape ", input.sizes(), ", weight ", weight_in.sizes(),
                "; [T, C] and [C, W] with W from 2 to ", kMostTaps, " are required.");
    taps = weight_in.size(1), tokens = input.size(0), channels = input.size(1);
    TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == channels), "causal_conv: bias has shape ",
                bias_in ? bias_in->sizes() : at::IntArrayRef{}, "; [", channels, "] is required.");
    bias = bias_in ? bias_in->to(type).contiguous() : zeros;
    TORCH_CHECK(places.dim() == 1 && places.size(0) > 0, "causal_conv: query_offsets has shape ", places.sizes(),
                "; [S + 1] is required.");
    segments = places.size(0) - 1;
    offsets = indices("query_offsets", places, {segments + 1});
    TORCH_CHECK(offsets[0] == 0, "causal_conv: query_offsets[0] must be 0, got ", offsets[0], ".");
    for (int64_t s = 0; s < segments; ++s)
      TORCH_CHECK(offsets[s] <= offsets[s + 1], "causal_conv: query_offsets[", s + 1, "] is ", offsets[s + 1],
                  "; must not be less than the one before, ", offsets[s], ".");
    TORCH_CHECK(offsets[segments] <= tokens, "causal_conv: query_offsets[", segments, "] is ", offsets[segments],
                "; there are ", tokens, " rows.");
  }

  // The segment of a row that is no padding.
  int64_t segment_of(int64_t row) const {
    return std::upper_bound(offsets, offsets + segments + 1, row) - offsets - 1;
  }

  // The last `count` inputs up to row t of segment s, oldest first.
  template <typename T>
  void inputs(const std::vector<const T*>& before, int64_t s, int64_t t, int64_t count, const T** found) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = t - (count - 1) + i, local = at - offsets[s];
      found[i] = local >= 0 ? x.row<T>(at) : before[s * (taps - 1) + taps - 1 + local];
    }
  }

  // body(row, segment) over the rows [begin, end), none of which is padding.
  template <typename Body>
  void each(int64_t begin, int64_t end, const Body& body) const {
    if (begin >= end) return;
    for (int64_t t = begin, s = segment_of(begin); t < end; ++t) {
      while (t >= offsets[s + 1]) ++s;
      body(t, s);
    }
  }

  at::ScalarType type;
  Matrix x;
  Tensor weight, bias, places, zeros;
  const int64_t* offsets;
  int64_t taps, tokens, channels, segments;
};

// What `past` names, as pointers; `held` are the rows of tails.
template <typename T>
std::vector<const T*> rows_before(const Problem& p, const int64_t* past, const std::optional<Matrix>& held) {
  const int64_t end = p.offsets[p.segments], given = held ? held->count : 0;
  std::vector<const T*> found(p.segments * (p.taps - 1));
  for (size_t i = 0; i < found.size(); ++i) {
    const int64_t row = past[i];
    TORCH_CHECK(row < end && row > -2 - given, "causal_conv: past[", i / (p.taps - 1), ", ", i % (p.taps - 1),
                "] must be a row below ", end, ", -1, or down to ", -1 - given, " for the ", given,
                " rows of tails, got ", row, ".");
    found[i] = row >= 0 ? p.x.row<T>(row) : row == -1 ? p.zeros.const_data_ptr<T>() : held->row<T>(-2 - row);
  }
  return found;
}

std::optional<Matrix> tail_rows(const Problem& p, const std::optional<Tensor>& tails) {
  if (!tails) return std::nullopt;
  TORCH_CHECK(tails->dim() == 3 && tails->size(1) == p.taps - 1 && tails->size(2) == p.channels,
              "causal_conv: tails has shape ", tails->sizes(), "; [N, ", p.taps - 1, ", ", p.channels,
              "] is required.");
  return Matrix(*tails, p.type);
}

// bias + the taps, oldest first, for the vector at channel c.
template <typename T>
inline Vec<T> taps_at(const Problem& p, const T* const* from, const T* weight, const T* bias, int64_t c, int64_t lanes) {
  auto sum = Vec<T>::loadu(bias + c, lanes);
  for (int64_t i = 0; i < p.taps; ++i)
    sum = at::vec::fmadd(Vec<T>::loadu(weight + i * p.channels + c, lanes), Vec<T>::loadu(from[i] + c, lanes), sum);
  return sum;
}

template <typename T, typename F>
Tensor convolved(const Problem& p, const std::vector<const T*>& before, const Tensor& like) {
  Tensor out = empty({p.tokens, p.channels}, like, p.type);
  T* to = out.mutable_data_ptr<T>();
  const T *weight = p.weight.const_data_ptr<T>(), *bias = p.bias.const_data_ptr<T>();
  const int64_t end = p.offsets[p.segments];
  std::fill(to + end * p.channels, to + p.tokens * p.channels, T(0));
  for_rows(end, p.channels * kWeight, [&](int64_t first, int64_t last) {
    p.each(first, last, [&](int64_t t, int64_t s) {
      const T* from[kMostTaps];
      p.inputs(before, s, t, p.taps, from);
      for_vectors<T>(p.channels, [&](int64_t c, int64_t lanes) {
        F::value(taps_at(p, from, weight, bias, c, lanes)).store(to + t * p.channels + c, lanes);
      });
    });
  });
  return out;
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const Tensor& query_offsets, const Tensor& past_in, const std::optional<Tensor>& tails,
               std::optional<c10::string_view> activation) {
  const Problem p(input, weight, bias, query_offsets);
  const auto held = tail_rows(p, tails);
  const Tensor kept = past_in.contiguous();
  const int64_t* past = indices("past", kept, {p.segments, p.taps - 1});
  Tensor out;
  with_kernel(p.type, activation, [&](auto zero, auto function) {
    using T = decltype(zero);
    out = convolved<T, decltype(function)>(p, rows_before<T>(p, past, held), input);
  });
  return cast(out, input.scalar_type());
}

// Who reads a row of [x, tails] as what lies before its segment: row r by consumers[starts[r]] to [starts[r + 1]], each
// an index into `past`, in ascending order.
struct Consumers {
  Consumers(const Problem& p, const int64_t* past, int64_t held) : starts(p.tokens + held + 1, 0) {
    const int64_t count = p.segments * (p.taps - 1);
    const auto row = [&](int64_t i) { return past[i] >= 0 ? past[i] : p.tokens - 2 - past[i]; };
    for (int64_t i = 0; i < count; ++i) starts[row(i) + 1] += past[i] != -1;
    for (size_t r = 1; r < starts.size(); ++r) starts[r] += starts[r - 1];
    places.resize(starts.back());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (past[i] != -1) places[next[row(i)]++] = i;
  }
  std::vector<int64_t> starts, places;
};

template <typename T>
struct Use {
  const T *weight, *grad;
};

// The gradient to one row of [x, tails]: of the tokens of the same segment that read it (none for tails), then of
// others.
template <typename T>
void gradient_of_row(const Problem& p, const Consumers& consumers, const T* before, int64_t row,
                     std::vector<Use<T>>& uses, T* to) {
  uses.clear();
  const T* weight = p.weight.const_data_ptr<T>();
  const auto use = [&](int64_t tap, int64_t token) {
    uses.push_back({weight + tap * p.channels, before + token * p.channels});
  };
  if (row < p.offsets[p.segments]) {
    const int64_t end = p.offsets[p.segment_of(row) + 1];
    for (int64_t t = row; t < std::min(end, row + p.taps); ++t) use(p.taps - 1 - (t - row), t);
  }
  for (int64_t i = consumers.starts[row]; i < consumers.starts[row + 1]; ++i) {
    const int64_t s = consumers.places[i] / (p.taps - 1), place = consumers.places[i] % (p.taps - 1);
    for (int64_t t = p.offsets[s]; t < p.offsets[s + 1] && t - p.offsets[s] <= place; ++t) {
      use(place - (t - p.offsets[s]), t);
    }
  }
  for_vectors<T>(p.channels, [&](int64_t c, int64_t lanes) {
    Vec<T> sum(0);
    for (const Use<T>& u : uses)
      sum = at::vec::fmadd(Vec<T>::loadu(u.weight + c, lanes), Vec<T>::loadu(u.grad + c, lanes), sum);
    sum.store(to + c, lanes);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& weight_in,
                                                    const std::optional<Tensor>& bias_in, const Tensor& query_offsets,
                                                    const Tensor& past_in, const std::optional<Tensor>& tails,
                                                    std::optional<c10::string_view> activation) {
  check_equal_shapes("causal_conv_backward", "grad", grad, "x", input);
  const Problem p(input, weight_in, bias_in, query_offsets);
  const auto held = tail_rows(p, tails);
  const Tensor kept = past_in.contiguous();
  const int64_t* past = indices("past", kept, {p.segments, p.taps - 1});
  const Matrix upstream(grad, p.type);
  const int64_t given = held ? held->count : 0, end = p.offsets[p.segments], channels = p.channels;
  Tensor before = empty({end, channels}, input, p.type), dx = empty(input.sizes(), input, p.type);
  Tensor to_tails = empty({given, channels}, input, p.type);
  Tensor sums = empty({(p.taps + 1) * channels}, input, p.type);
  with_kernel(p.type, activation, [&](auto zero, auto function) {
    using T = decltype(zero);
    using F = decltype(function);
    const auto rows = rows_before<T>(p, past, held);
    const Consumers consumers(p, past, given);
    const T *weight = p.weight.const_data_ptr<T>(), *bias = p.bias.const_data_ptr<T>();
    T *inner = before.mutable_data_ptr<T>(), *to = dx.mutable_data_ptr<T>(), *tail = to_tails.mutable_data_ptr<T>();
    // The gradient before the activation, and what it adds to each tap's weight and to the bias.
    Blocks(end).sum((p.taps + 1) * channels, sums.mutable_data_ptr<T>(), [&](int64_t first, int64_t last, T* total) {
      p.each(first, last, [&](int64_t t, int64_t s) {
        const T* from[kMostTaps];
        p.inputs(rows, s, t, p.taps, from);
        const T* above = upstream.row<T>(t);
        for_vectors<T>(channels, [&](int64_t c, int64_t lanes) {
          auto g = Vec<T>::loadu(above + c, lanes);
          if constexpr (!std::is_same_v<F, None>) g = g * F::both(taps_at(p, from, weight, bias, c, lanes)).derivative;
          g.store(inner + t * channels + c, lanes);
          for (int64_t i = 0; i < p.taps; ++i) {
            T* sum = total + i * channels + c;
            at::vec::fmadd(g, Vec<T>::loadu(from[i] + c, lanes), Vec<T>::loadu(sum, lanes)).store(sum, lanes);
          }
          T* sum = total + p.taps * channels + c;
          (Vec<T>::loadu(sum, lanes) + g).store(sum, lanes);
        });
      });
    });
    for_rows(p.tokens + given, channels * kWeight, [&](int64_t first, int64_t last) {
      std::vector<Use<T>> uses;
      for (int64_t row = first; row < last; ++row) {
        gradient_of_row<T>(p, consumers, inner, row, uses,
                           row < p.tokens ? to + row * channels : tail + (row - p.tokens) * channels);
      }
    });
  });
  const auto to_weight = sums.narrow(0, 0, p.taps * channels).view({p.taps, channels}).t().contiguous();
  return {cast(dx, input.scalar_type()), cast(to_weight, weight_in.scalar_type()),
          bias_in ? cast(sums.narrow(0, p.taps * channels, channels).clone(), bias_in->scalar_type())
                  : empty({0}, input, input.scalar_type()),
          tails ? cast(to_tails.view(tails->sizes()), tails->scalar_type()) : empty({0}, input, input.scalar_type())};
}

// The last inputs up to each saved row, to its frame.
template <typename T>
void save(const Problem& p, const std::vector<const T*>& before, int64_t saves, const int64_t* save_rows,
          const int64_t* save_frames, const Tensor& tails) {
  dtypes::with_types(tails.scalar_type(), [&](auto, auto stored) {
    using S = decltype(stored);
    S* pool = tails.mutable_data_ptr<S>();
    for_rows(saves, p.channels * (p.taps - 1), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (save_frames[i] < 0) continue;
        const T* from[kMostTaps];
        p.inputs(before, p.segment_of(save_rows[i]), save_rows[i], p.taps - 1, from);
        for (int64_t tap = 0; tap < p.taps - 1; ++tap) {
          S* to = pool + save_frames[i] * tails.stride(0) + tap * tails.stride(1);
          for (int64_t c = 0; c < p.channels; ++c) to[c] = static_cast<S>(from[tap][c]);
        }
      }
    });
  });
}

Tensor paged(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& query_offsets,
             const Tensor& sources_in, const Tensor& save_rows_in, const Tensor& save_frames_in, const Tensor& tails,
             std::optional<c10::string_view> activation) {
  const Problem p(input, weight, bias, query_offsets);
  tail_rows(p, tails.narrow(0, 0, 0));  // its shape
  TORCH_CHECK(tails.scalar_type() == input.scalar_type() || tails.scalar_type() == p.type,
              "causal_conv_paged: tails must have dtype ", input.scalar_type(), " or ", p.type, ", got ",
              tails.scalar_type(), ".");
  TORCH_CHECK(p.channels < 2 || tails.stride(2) == 1, "causal_conv_paged: tails has strides ", tails.strides(),
              "; a contiguous last dimension is required.");
  const Tensor kept[3] = {sources_in.contiguous(), save_rows_in.contiguous(), save_frames_in.contiguous()};
  const int64_t saves = save_rows_in.numel(), frames = tails.size(0);
  const int64_t* sources = indices("sources", kept[0], {p.segments});
  const int64_t* save_rows = indices("save_rows", kept[1], {saves});
  const int64_t* save_frames = indices("save_frames", kept[2], {saves});
  for (int64_t s = 0; s < p.segments; ++s)
    TORCH_CHECK(sources[s] < frames, "causal_conv_paged: sources[", s, "] is ", sources[s], "; there are ", frames,
                " frames.");
  for (int64_t i = 0; i < saves; ++i) {
    TORCH_CHECK(save_frames[i] < frames, "causal_conv_paged: save_frames[", i, "] is ", save_frames[i], "; there are ",
                frames, " frames.");
    TORCH_CHECK(save_rows[i] >= (i ? save_rows[i - 1] : 0) && save_rows[i] < p.offsets[p.segments],
                "causal_conv_paged: save_rows[", i, "] is ", save_rows[i], "; ascending rows below ",
                p.offsets[p.segments], " are required.");
  }
  // A copy of every source: a frame may be written while others of its segment are still to be read.
  const Tensor taken = frames ? at::index_select(tails, 0, kept[0].clamp_min(0)).to(p.type)
                              : at::zeros({p.segments, p.taps - 1, p.channels}, input.options().dtype(p.type));
  Tensor out;
  with_kernel(p.type, activation, [&](auto zero, auto function) {
    using T = decltype(zero);
    std::vector<const T*> before(p.segments * (p.taps - 1), p.zeros.const_data_ptr<T>());
    for (size_t i = 0; i < before.size(); ++i)
      if (sources[i / (p.taps - 1)] >= 0) before[i] = taken.const_data_ptr<T>() + i * p.channels;
    out = convolved<T, decltype(function)>(p, before, input);
    save(p, before, saves, save_rows, save_frames, tails);
  });
  return cast(out, input.scalar_type());
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("causal_conv", &forward);
  m.impl("causal_conv_backward", &backward);
  m.impl("causal_conv_paged", &paged);
}

}  // namespace toolkit::causal_conv_op
