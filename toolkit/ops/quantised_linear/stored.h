// A quantised weight as the native kernels see it: checked pointers to packed codes and scales (packing.py).
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "codes.h"

namespace toolkit::quantised {

using at::Tensor;

struct Stored {
  std::string_view format;
  int64_t outputs, inputs;
  const int32_t* codes = nullptr;  // [panels, words, 16]
  int64_t panels = 0, words = 0, groups = 0, group = 0;
  const void* scales[4] = {};
  at::ScalarType scale_type = at::kFloat;  // of scales[0]
  int count = 0;                           // of scales
  int64_t nested = 0;                      // elements of a nested scale
  std::vector<Tensor> kept;                // copies of what was not contiguous

  // Where the numbers of an argument of the op lie, which outlives this.
  const void* keep(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    kept.push_back(tensor.contiguous());
    return kept.back().const_data_ptr();
  }

  template <typename T>
  const T* scale(int i) const {
    return static_cast<const T*>(scales[i]);
  }
  // Where what scales[i] holds for lanes from `lane` of a group lies.
  template <typename T>
  const T* at(int i, int64_t panel, int64_t g, int64_t lane) const {
    return scale<T>(i) + (panel * groups + g) * kPanel + lane;
  }

  void take_codes(const Tensor& tensor, int bits, at::ScalarType type) {
    panels = (outputs + kPanel - 1) / kPanel;
    words = (inputs * bits + 31) / 32;
    const int64_t lanes[4] = {panels, words, kPanel, 4};
    const at::IntArrayRef shape(lanes, bits == 8 ? 4 : 3);
    TORCH_CHECK(tensor.sizes() == shape && tensor.scalar_type() == type, format, ": codes must be ", type, " of shape ",
                shape, " for a weight [", outputs, ", ", inputs, "], got ", tensor.scalar_type(), " of shape ",
                tensor.sizes(), ".");
    codes = static_cast<const int32_t*>(keep(tensor));
  }

  void take_count(const at::TensorList& tensors, std::initializer_list<int> allowed) {
    count = static_cast<int>(tensors.size());
    TORCH_CHECK(std::find(allowed.begin(), allowed.end(), count) != allowed.end(), format, ": scales must be ",
                *allowed.begin(), allowed.size() > 1 ? " or " + std::to_string(*(allowed.end() - 1)) : std::string(),
                " tensors, got ", count, ".");
  }

  // Of the sizes that a format allows the one that cuts K into as many groups as `tensor` [P, G, 16] has; 0: all of K.
  void take_groups(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    groups = tensor.dim() == 3 ? tensor.size(1) : -1;
    for (const int64_t size : sizes) {
      group = size == 0 ? std::max<int64_t>(inputs, 1) : size;
      if (groups == (size == 0 ? 1 : (inputs + group - 1) / group)) return;
    }
    TORCH_CHECK(false, format, ": the scales have shape ", tensor.sizes(), ", which no group size cuts K = ", inputs,
                " into.");
  }

  void take(int i, const char* name, const Tensor& tensor, at::IntArrayRef shape,
            std::initializer_list<at::ScalarType> types) {
    const auto type = tensor.scalar_type();
    TORCH_CHECK(tensor.sizes() == shape && std::find(types.begin(), types.end(), type) != types.end(), format, ": ",
                name, " must be ", *types.begin(), " (or another that the format allows) of shape ", shape, ", got ", type,
                " of shape ", tensor.sizes(), ".");
    if (i == 0) scale_type = type;
    scales[i] = keep(tensor);
  }
  void take_per_group(int i, const char* name, const Tensor& tensor, std::initializer_list<at::ScalarType> types) {
    take(i, name, tensor, {panels, groups, kPanel}, types);
  }
};

// kLanes scales of a group from lane `lane`, of any of the types that a scale may have.
inline Floats load_scale(const Stored& w, int64_t panel, int64_t g, int64_t lane) {
  switch (w.scale_type) {
    case at::kHalf: return load(w.at<c10::Half>(0, panel, g, lane));
    case at::kBFloat16: return load(w.at<c10::BFloat16>(0, panel, g, lane));
    default: return load(w.at<float>(0, panel, g, lane));
  }
}

// What most formats have: one variant, and no code that is a NaN.
template <typename Format>
struct Plain {
  static constexpr bool kHasNan = false;
  template <typename Body>
  static void with_variant(const Stored&, int64_t, int64_t, const Body& body) {
    body(Format{});
  }
};

}  // namespace toolkit::quantised
