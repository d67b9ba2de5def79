// gated_linear on CPU: both products of a gated MLP and its activation in one parallel section. A task computes the same
// columns of gate and up and combines them while they are in its cache. Bits are those of linear and gated_activation:
// in the 16-bit types gate and up are rounded before the activation.
#include "activation_kinds.h"
#include "matmul.h"

namespace toolkit::gated_linear_op {

using namespace toolkit::rows;

void check(const char* name, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1) &&
                  weight.scalar_type() == x.scalar_type(),
              "gated_linear: ", name, " must have shape [N, ", x.dim() ? x.size(-1) : 0, "] and the dtype of x, ",
              x.scalar_type(), ", got ", weight.sizes(), " and ", weight.scalar_type(), ".");
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == x.scalar_type()),
              "gated_linear: the bias of ", name, " must have shape [", weight.size(0), "] and the dtype of x, got ",
              bias ? bias->sizes() : at::IntArrayRef{}, ".");
}

// gate = f(gate) * up on columns [first, last) of rows [row, row_end).
template <typename T, typename S, typename F>
void combine(const F& f, T* gate, T* up, int64_t stride, int64_t row, int64_t row_end, int64_t first, int64_t last) {
  for (int64_t r = row; r < row_end; ++r) {
    T *const g = gate + r * stride + first, *const u = up + r * stride + first;
    storage::round_through<S>(g, last - first);
    storage::round_through<S>(u, last - first);
    for_vectors<T>(last - first, [&](int64_t i, int64_t lanes) {
      const auto a = Vec<T>::loadu(g + i, lanes), b = Vec<T>::loadu(u + i, lanes);
      if constexpr (F::kArguments == 2) {
        f.value(a, b).store(g + i, lanes);
      } else {
        (f.value(a) * b).store(g + i, lanes);
      }
    });
  }
}

template <typename T, typename S, typename F>
void run(const F& f, const matmul::Problem<T, S>& gate, const matmul::Problem<T, S>& up) {
  const gemm::Panels<T> panels(gate.outputs, gate.rows);
  const auto cut = [](int64_t count, int64_t parts) { return (count + parts - 1) / parts; };
  const int64_t work = 2 * matmul::cost(gate.rows, gate.outputs * gate.depth);
  const int64_t workers = work >= matmul::kParallelWork ? at::get_num_threads() : 1;
  const int64_t row_blocks = cut(gate.rows, matmul::kRowBlock);
  const int64_t height = cut(cut(gate.rows, gemm::kMaxRows), row_blocks) * gemm::kMaxRows;
  const int64_t wanted =
      std::clamp<int64_t>(panels.count() * row_blocks / (workers * matmul::kTasks), 1, matmul::kChunk);
  const int64_t chunk = cut(panels.count(), std::max<int64_t>(1, cut(panels.count(), wanted)));
  const int64_t chunks = cut(panels.count(), chunk);
  threads::run_tasks(row_blocks * chunks, workers, [&](int64_t task) {
    const int64_t row = task / chunks * height, row_end = std::min(row + height, gate.rows);
    const int64_t panel = task % chunks * chunk, panel_end = std::min(panel + chunk, panels.count());
    if (row >= row_end) return;
    for (const auto* problem : {&gate, &up})
      if (problem->depth > 0) matmul::block(*problem, row, row_end, panel, panel_end);
    const int64_t last = panels.begin(panel_end - 1) + panels.columns(panel_end - 1);
    combine<T, S>(f, gate.out, up.out, gate.out_stride, row, row_end, panels.begin(panel), last);
  });
}

Tensor gated_linear(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
                    c10::string_view kind) {
  check("gate_weight", x, gate_weight, gate_bias);
  check("up_weight", x, up_weight, up_bias);
  check_equal_shapes("gated_linear", "up_weight", up_weight, "gate_weight", gate_weight);
  const auto type = compute_type(x, "gated_linear");
  const Tensor from = cast(x, type).contiguous();
  const int64_t outputs = gate_weight.size(0), depth = gate_weight.size(1);
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor gate = empty(shape, x, type), up = empty(shape, x, type);
  if (gate.numel() == 0) return cast(gate, x.scalar_type());
  const auto rows_of = [](const Tensor& weight) {
    return weight.size(1) > 1 && weight.stride(1) != 1 ? weight.contiguous() : weight;
  };
  const auto shift_of = [&](const std::optional<Tensor>& bias) {
    return bias ? cast(*bias, type).contiguous() : Tensor();
  };
  const Tensor weights[] = {rows_of(gate_weight), rows_of(up_weight)}, shifts[] = {shift_of(gate_bias), shift_of(up_bias)};
  dtypes::with_types(x.scalar_type(), [&](auto compute, auto stored) {
    using T = decltype(compute);
    using S = decltype(stored);
    const auto problem = [&](int i, Tensor& out) {
      return matmul::Problem<T, S>{from.const_data_ptr<T>(), depth, weights[i].const_data_ptr<S>(),
                                   weights[i].stride(0), shifts[i].defined() ? shifts[i].const_data_ptr<T>() : nullptr,
                                   out.mutable_data_ptr<T>(), outputs, out.numel() / outputs, outputs, depth};
    };
    const auto of_gate = problem(0, gate), of_up = problem(1, up);
    if (depth == 0) {
      matmul::fill_empty(of_gate);
      matmul::fill_empty(of_up);
    }
    activations::with_kind({kind.data(), kind.size()}, [&](auto f) { run(f, of_gate, of_up); });
  });
  return cast(gate, x.scalar_type());
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("gated_linear", &gated_linear); }

}  // namespace toolkit::gated_linear_op
