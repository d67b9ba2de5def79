// A quantised weight by its format's name, and a kernel for the variant of it.
#pragma once
#include "many_rows.h"
#include "quantised_formats.h"

namespace toolkit::quantised {

// Rows up to which decoding for every few of them, in registers, costs less than once for all, through memory.
constexpr int64_t kFewRows = 16;

inline Stored stored(std::string_view format, const Tensor& codes, at::TensorList scales, int64_t outputs, int64_t inputs) {
  TORCH_CHECK(outputs >= 0 && inputs >= 0, "quantised_linear: the weight must have sizes >= 0, got [", outputs, ", ",
              inputs, "].");
  Stored w{format, outputs, inputs};
  with_format(format, [&](auto kind) {
    using Format = decltype(kind);
    w.take_codes(codes, Format::kBits, Format::kCodes);
    Format::read(w, scales);
  });
  return w;
}

// body(Format{}) for a variant of the weight's format that serves the panels [first, last).
template <typename Body>
void with_variant_of(const Stored& w, int64_t first, int64_t last, const Body& body) {
  with_format(w.format, [&](auto kind) { decltype(kind)::with_variant(w, first, last, body); });
}
template <typename Body>
void with_variant_of(const Stored& w, const Body& body) {
  with_variant_of(w, 0, w.panels, body);
}

// The dense weight [outputs, inputs].
inline Tensor dense(const Stored& w, const Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK(dtypes::is_float(dtype), "dequantise: dtype must be float32, float64, bfloat16 or float16, got ", dtype, ".");
  Tensor out = memory::empty({w.outputs, w.inputs}, like.options().dtype(dtype));
  if (out.numel() == 0) return out;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (w.inputs * kPanel));
  with_variant_of(w, [&](auto kind) {
    dtypes::with_types(dtype, [&](auto, auto store) {
      using D = decltype(store);
      D* const to = out.mutable_data_ptr<D>();
      threads::parallel_for(0, w.panels, grain, [&](int64_t first, int64_t last) {
        dequantise_panels<decltype(kind), D>(w, first, last, to);
      });
    });
  });
  return out;
}

}  // namespace toolkit::quantised
