// The type of an op's arithmetic and the type that its tensors are stored in.
#pragma once
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace toolkit::dtypes {

inline bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// float for the 32- and 16-bit formats, double for double.
inline at::ScalarType upcast(at::ScalarType stored) { return stored == at::kDouble ? at::kDouble : at::kFloat; }

// body(T{}, S{}) for a dtype that `is_float`: arithmetic in T, storage in S.
template <typename Body>
inline void with_types(at::ScalarType stored, const Body& body) {
  switch (stored) {
    case at::kDouble: return body(double{}, double{});
    case at::kBFloat16: return body(float{}, c10::BFloat16{});
    case at::kHalf: return body(float{}, c10::Half{});
    default: return body(float{}, float{});
  }
}

}  // namespace toolkit::dtypes
