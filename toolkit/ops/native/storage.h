// Rows of numbers between the type that they are stored in and the type of the arithmetic. Reading is exact; writing
// rounds to nearest, ties to even.
#pragma once
#include <ATen/cpu/vec/functional_bfloat16.h>
#include <ATen/cpu/vec/vec.h>

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

}  // namespace toolkit::storage
