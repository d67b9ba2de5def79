// Experts whose weights are codes: a grouped GEMM decodes those of the experts that have rows, and no others.
#pragma once
#include "../experts/experts.h"
#include "../quantised_linear/variants.h"

namespace toolkit::experts_op {

// Weights [E, outputs, inputs] as one quantised weight of E outputs in whole panels.
struct CodedExperts {
  quantised::Stored weight;
  int64_t outputs;

  // Whether the kernels below take them; otherwise dequantise.
  static bool serve(int64_t outputs, int64_t inputs, at::ScalarType dtype) {
    return outputs > 0 && inputs > 0 && outputs % quantised::kPanel == 0 && dtype != at::kDouble;
  }

  // As DenseExperts has it.
  template <typename E, typename S, typename O>
  void multiply(const Plan& plan, const Tensor& x, bool gather, bool to_inputs,
                const std::optional<ExpertBias<gemm::Sum<E>>>& bias, Tensor& out) const {
    if constexpr (std::is_same_v<gemm::Sum<E>, float>) {
      const int64_t depth = to_inputs ? outputs : weight.inputs, width = to_inputs ? weight.inputs : outputs;
      O* const to = out.mutable_data_ptr<O>();
      Work<E, S, O> work{*this, plan, depth, width, gemm::steps_of<E>(depth), to};
      work.copy(x, gather, to_inputs);
      work.run(to_inputs, bias);
      std::fill(to + plan.used * width, to + out.size(0) * width, O(0));
    }
  }

 private:
  template <typename E, typename S, typename O>
  struct Work {
    const CodedExperts& of;
    const Plan& plan;
    const int64_t depth, width, steps;
    O* const to;
    Tensor elements;
    std::vector<int64_t> at;  // of each expert, its first row in `elements`

    static bool few(int64_t rows, bool to_inputs) { return !to_inputs && rows <= quantised::kFewRows; }

    // Rows of x of one expert after the other, as the kernels read them.
    void copy(const Tensor& x, bool gather, bool to_inputs) {
      using Operand = gemm::Operand<E>;
      const int64_t terms = steps * gemm::kTerms<E>;
      int64_t room = 0;
      at.assign(plan.experts, 0);
      plan.for_experts(false, [&](int64_t e, int64_t first, int64_t end) {
        at[e] = room;
        room += few(end - first, to_inputs) ? quantised::padded_rows(end - first) : end - first;
      });
      elements = at::empty({room, terms}, x.options());
      const Operand* const from = x.const_data_ptr<Operand>();
      Operand* const rows = elements.mutable_data_ptr<Operand>();
      plan.for_experts(false, [&](int64_t e, int64_t first, int64_t end) {
        const int64_t height = few(end - first, to_inputs) ? quantised::padded_rows(end - first) : end - first;
        for (int64_t r = 0; r < height; ++r) {
          Operand* const row = rows + (at[e] + r) * terms;
          const bool real = first + r < end;
          if (real) std::copy_n(from + (gather ? plan.token_of[first + r] : first + r) * x.stride(0), depth, row);
          std::fill(row + (real ? depth : 0), row + terms, Operand(0));
        }
      });
    }

    // What depends on the format.
    struct Kernels {
      decltype(quantised::Large<E, O>::pack) pack;
      decltype(quantised::Problem::run) run_units;
    };
    Kernels kernels_of(int64_t first_panel, int64_t last_panel, bool to_inputs) const {
      Kernels found{};
      quantised::with_variant_of(of.weight, first_panel, last_panel, [&](auto kind) {
        using Format = decltype(kind);
        found.pack = to_inputs ? &quantised::pack_inputs<Format, E, S> : &quantised::pack_outputs<Format, E, S>;
        found.run_units = &quantised::run_units<Format, E, S>;
      });
      return found;
    }

    void run(bool to_inputs, const std::optional<ExpertBias<float>>& bias) {
      const int64_t panels = of.outputs / quantised::kPanel;
      const E* const rows = static_cast<const E*>(elements.const_data_ptr());
      Tensor sums;
      std::vector<quantised::Problem> problems;
      std::vector<std::pair<int64_t, int64_t>> rounded;  // rows whose sums are rounded at their end
      if constexpr (!std::is_same_v<O, float>) sums = at::empty({plan.used, width}, elements.options().dtype(at::kFloat));
      plan.for_experts(false, [&](int64_t e, int64_t first, int64_t end) {
        const float* const shift = bias ? bias->of(e) : nullptr;
        const Kernels kernels = kernels_of(e * panels, (e + 1) * panels, to_inputs);
        if (!few(end - first, to_inputs)) {
          const quantised::Large<E, O> gemm{of.weight,   e * of.outputs, kernels.pack, rows + at[e] * steps,
                                            steps,       end - first,    depth,        width,
                                            shift,       to + first * width};
          return gemm.run();
        }
        float* out;
        if constexpr (std::is_same_v<O, float>)
          out = to + first * width;
        else
          out = sums.mutable_data_ptr<float>() + first * width;
        problems.push_back({&of.weight, e * panels, of.outputs, rows + at[e] * steps, end - first, shift, out,
                            kernels.run_units});
        rounded.emplace_back(first, end);
      });
      if (!problems.empty()) quantised::run(problems);
      if constexpr (!std::is_same_v<O, float>)
        for (const auto& [first, end] : rounded)
          storage::write_row(sums.const_data_ptr<float>() + first * width, (end - first) * width, to + first * width);
    }
  };
};

}  // namespace toolkit::experts_op
