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
void combine(S* gate, const S* up, int64_t stride, int64_t row, int64_t row_end, int64_t first, int64_t last) {
  const F f;
  const int64_t count = last - first;
  T *const g = threads::scratch<T, 7>(2 * count), *const u = g + count;
  for (int64_t r = row; r < row_end; ++r) {
    storage::read_row(gate + r * stride + first, count, g);
    storage::read_row(up + r * stride + first, count, u);
    for_vectors<T>(count, [&](int64_t i, int64_t lanes) {
      const auto a = Vec<T>::loadu(g + i, lanes), b = Vec<T>::loadu(u + i, lanes);
      if constexpr (F::kArguments == 2) {
        f.value(a, b).store(g + i, lanes);
      } else {
        (f.value(a) * b).store(g + i, lanes);
      }
    });
    storage::write_row(g, count, gate + r * stride + first);
  }
}

// `combine` of one kind: the GEMMs around it are the same for all, and compiled once.
template <typename S>
using Combine = void (*)(S* gate, const S* up, int64_t stride, int64_t row, int64_t row_end, int64_t first,
                         int64_t last);

template <typename T, typename S>
void run(Combine<S> combine_columns, const matmul::Problem<T, S>& gate,
         const matmul::Problem<T, S>& up, S* gate_out, const S* up_out) {
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
    combine_columns(gate_out, up_out, gate.out_stride, row, row_end, panels.begin(panel), last);
  });
}

Tensor gated_linear(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
                    c10::string_view kind) {
  check("gate_weight", x, gate_weight, gate_bias);
  check("up_weight", x, up_weight, up_bias);
  check_equal_shapes("gated_linear", "up_weight", up_weight, "gate_weight", gate_weight);
  const auto type = compute_type(x, "gated_linear");
  const Tensor from = cast(x, gemm::operand_type(x.scalar_type())).contiguous();
  const int64_t outputs = gate_weight.size(0), depth = gate_weight.size(1);
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor gate = empty(shape, x, x.scalar_type()), up = empty(shape, x, x.scalar_type());
  if (gate.numel() == 0) return gate;
  const auto rows_of = [](const Tensor& weight) {
    return weight.size(1) > 1 && weight.stride(1) != 1 ? weight.contiguous() : weight;
  };
  const auto shift_of = [&](const std::optional<Tensor>& bias) {
    return bias ? cast(*bias, type).contiguous() : Tensor();
  };
  const Tensor weights[] = {rows_of(gate_weight), rows_of(up_weight)}, shifts[] = {shift_of(gate_bias), shift_of(up_bias)};
  gemm::with_elements(x.scalar_type(), [&](auto element, auto stored) {
    using E = decltype(element);
    using T = gemm::Sum<E>;
    using S = decltype(stored);
    const auto problem = [&](int i, Tensor& out) {
      matmul::Problem<E, S> made{from.const_data_ptr<gemm::Operand<E>>(), depth, weights[i].const_data_ptr<S>(),
                                 weights[i].stride(0), shifts[i].defined() ? shifts[i].const_data_ptr<T>() : nullptr,
                                 nullptr, outputs, out.numel() / outputs, outputs, depth};
      matmul::write_to(made, out.mutable_data_ptr<S>());
      return made;
    };
    const auto of_gate = problem(0, gate), of_up = problem(1, up);
    if (depth == 0) {
      matmul::fill_empty(of_gate);
      matmul::fill_empty(of_up);
    }
    Combine<S> combine_columns = nullptr;
    activations::with_kind({kind.data(), kind.size()}, [&](auto f) {
      combine_columns = &combine<T, S, decltype(f)>;
    });
    run(combine_columns, of_gate, of_up, gate.mutable_data_ptr<S>(), up.const_data_ptr<S>());
  });
  return gate;
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("gated_linear", &gated_linear); }

}  // namespace toolkit::gated_linear_op
