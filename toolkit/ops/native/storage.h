// Rows of numbers between the type that they are stored in and the type of the arithmetic. Reading is exact; writing
// rounds to nearest, ties to even.
#pragma once
#include <ATen/cpu/vec/functional_bfloat16.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <type_traits>

#include "dtypes.h"

namespace toolkit::storage {

template <typename S, typename T>
inline void read_row(const S* from, int64_t count, T* to) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(to, from, count * sizeof(T));
  } else {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, float> && sizeof(S) == 2) {
      using Vec = at::vec::Vectorized<float>;
      for (Vec wide; i + Vec::size() <= count; i += Vec::size()) {
        at::vec::load_to_float<S>(from + i, wide);
        wide.store(to + i);
      }
    }
    for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }
}

template <typename T, typename S>
inline void write_row(const T* from, int64_t count, S* to) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(to, from, count * sizeof(T));
  } else {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, float> && sizeof(S) == 2) {
      using Vec = at::vec::Vectorized<float>;
      using Narrow = at::vec::Vectorized<S>;
      for (; i + Narrow::size() <= count; i += Narrow::size())
        at::vec::convert_from_float<S>(Vec::loadu(from + i), Vec::loadu(from + i + Vec::size())).store(to + i);
    }
    for (; i < count; ++i) to[i] = static_cast<S>(from[i]);
  }
}

// What is left of a row that is stored as S and read again.
template <typename S, typename T>
inline void round_through(T* row, int64_t count) {
  if constexpr (!std::is_same_v<T, S>) {
    constexpr int64_t kPart = 64;
    S part[kPart];
    for (int64_t i = 0; i < count; i += kPart) {
      const int64_t n = count - i < kPart ? count - i : kPart;
      write_row(row + i, n, part);
      read_row(part, n, row + i);
    }
  }
}

// A row rounded to S, stored as S or as numbers that hold it.
template <typename S, typename T, typename O>
inline void round_row(T* row, int64_t count, O* to) {
  if constexpr (std::is_same_v<T, O>) {
    round_through<S>(row, count);
    if (row != to) std::memcpy(to, row, count * sizeof(T));
  } else {
    write_row(row, count, to);
  }
}

// Up to a vector of T from numbers that are stored as S, and to them.
template <typename T, typename S>
inline at::vec::Vectorized<T> load(const S* from, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  if constexpr (std::is_same_v<S, T>) {
    return Vec::loadu(from, count);
  } else {
    if (count == Vec::size()) {
      Vec wide;
      at::vec::load_to_float<S>(from, wide);
      return wide;
    }
    T wide[Vec::size()];
    read_row(from, count, wide);
    return Vec::loadu(wide, count);
  }
}
template <typename T, typename S>
inline void store(const at::vec::Vectorized<T>& value, S* to, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    value.store(to, count);
  } else {
    constexpr int kSize = at::vec::Vectorized<T>::size();
    S both[2 * kSize];
    at::vec::convert_from_float<S>(value, value).store(both);
    if (count == kSize)
      std::memcpy(to, both, kSize * sizeof(S));
    else
      std::memcpy(to, both, count * sizeof(S));
  }
}

// Small tensors are converted here: torch takes longer to start than a row takes to convert.
constexpr int64_t kSmall = 1 << 15;

// x in another of the dtypes of `dtypes::is_float`; the same tensor where it has it already.
inline at::Tensor cast(const at::Tensor& x, at::ScalarType type) {
  const auto from = x.scalar_type();
  if (from == type) return x;
  const bool narrow = type == at::kBFloat16 || type == at::kHalf, upcast = from == at::kBFloat16 || from == at::kHalf;
  const bool supported = (narrow && from == at::kFloat) || (upcast && type == at::kFloat);
  if (!supported || x.numel() > kSmall || !x.is_contiguous() || x.requires_grad()) return x.to(type);
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(type));
  dtypes::with_types(narrow ? type : from, [&](auto, auto stored) {
    using S = decltype(stored);
    if constexpr (sizeof(S) == 2) {
      if (narrow)
        write_row(x.const_data_ptr<float>(), x.numel(), out.mutable_data_ptr<S>());
      else
        read_row(x.const_data_ptr<S>(), x.numel(), out.mutable_data_ptr<float>());
    }
  });
  return out;
}

}  // namespace toolkit::storage
