// Sampling and penalties on CPU: rows are split over threads, each row's arithmetic has one order.
#include "row.h"

namespace toolkit::sample_op {

struct Sampled {
  int64_t token;
  double logprob;
};

template <typename T>
Sampled sample_row(const T* x, int64_t n, double temperature, int64_t k, double p, double min_p, double u,
                   Scratch& scratch) {
  const T max = largest(x, n);
  const bool hot = temperature > 0;
  const double top = hot ? static_cast<double>(max) / temperature : static_cast<double>(max);
  if (!hot || !std::isfinite(static_cast<double>(max)) || !std::isfinite(top)) {
    return {first(x, n, max), std::isfinite(top) ? 0.0 : std::numeric_limits<double>::quiet_NaN()};
  }
  const bool limited = k > 0 && k < n;
  const T least = limited ? top_k_threshold(x, n, k, max) : max;
  Row<T> row(x, n, scratch);
  const bool nucleus = p < 1.0;
  row.weigh(temperature, top, least, limited, nucleus && !limited);
  if (nucleus && limited) row.keep_nucleus_among(p, least);
  if (nucleus && !limited) row.keep_nucleus(p);
  const double total = row.accumulate_blocks(std::min(min_p, 1.0));
  const int64_t token = row.sample(u, total);
  return {token, std::log(row.w[token] / total)};
}

void check_column(const char* op, const char* name, const Tensor& column, int64_t length) {
  TORCH_CHECK(column.dim() == 1 && column.size(0) == length, op, ": ", name, " must have shape [", length, "], got ",
              column.sizes(), ".");
}

void check_logits(const char* op, const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, ": logits must have shape [B, V] with V >= 1, got ",
              logits.sizes(), ".");
}

// A column of parameters as T, and the tensor that holds it.
template <typename T>
struct Column {
  Column(const char* op, const char* name, const Tensor& x, int64_t length)
      : tensor((check_column(op, name, x, length), x.to(c10::CppTypeToScalarType<T>::value).contiguous())),
        data(tensor.template const_data_ptr<T>()) {}
  T operator[](int64_t i) const { return data[i]; }
  Tensor tensor;
  const T* data;
};

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                  const Tensor& top_p, const Tensor& min_p, const Tensor& seeds, const Tensor& steps) {
  check_logits("sample", logits);
  const int64_t rows = logits.size(0);
  const auto type = compute_type(logits, "sample");
  const Column<double> heat("sample", "temperature", temperature, rows), p("sample", "top_p", top_p, rows),
      relative("sample", "min_p", min_p, rows);
  const Column<int64_t> k("sample", "top_k", top_k, rows), seed("sample", "seeds", seeds, rows),
      step("sample", "steps", steps, rows);
  const Matrix x(logits, type);
  Tensor tokens = empty({rows}, logits, at::kLong), logprobs = empty({rows}, logits, at::kDouble);
  int64_t* to_tokens = tokens.mutable_data_ptr<int64_t>();
  double* to_logprobs = logprobs.mutable_data_ptr<double>();
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    threads::parallel_for(0, rows, std::max<int64_t>(1, kGrain / 8 / x.width), [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      for (int64_t r = begin; r < end; ++r) {
        const double u = uniform(static_cast<uint64_t>(seed[r]), static_cast<uint64_t>(step[r]));
        const auto [token, logprob] = sample_row(x.row<T>(r), x.width, heat[r], k[r], p[r], relative[r], u, scratch);
        to_tokens[r] = token;
        to_logprobs[r] = logprob;
      }
    });
  });
  return {tokens, logprobs};
}

// What a thread keeps of a row's history: all zero between rows, so that only what was touched is cleared.
struct Counts {
  std::vector<uint8_t> seen;
  std::vector<int32_t> output;
};

Tensor penalize(const Tensor& logits, const Tensor& history, const Tensor& offsets, const Tensor& prompt_lengths,
                const Tensor& repetition, const Tensor& frequency, const Tensor& presence, const Tensor& barred,
                const Tensor& barred_offsets) {
  check_logits("penalize", logits);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const auto type = compute_type(logits, "penalize");
  const Column<int64_t> tokens("penalize", "history", history, history.numel()),
      start("penalize", "offsets", offsets, rows + 1), prompt("penalize", "prompt_lengths", prompt_lengths, rows),
      ends("penalize", "barred", barred, barred.numel()),
      ends_start("penalize", "barred_offsets", barred_offsets, rows + 1);
  const Column<double> factor("penalize", "repetition", repetition, rows),
      each("penalize", "frequency", frequency, rows), once("penalize", "presence", presence, rows);
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK(0 <= start[r] && start[r] <= start[r + 1] && start[r + 1] <= history.numel(),
                "penalize: offsets ", start[r], " and ", start[r + 1], " of row ", r,
                " do not lie in order within a history of ", history.numel(), ".");
    TORCH_CHECK(0 <= ends_start[r] && ends_start[r] <= ends_start[r + 1] && ends_start[r + 1] <= barred.numel(),
                "penalize: barred_offsets ", ends_start[r], " and ", ends_start[r + 1], " of row ", r,
                " do not lie in order within a list of ", barred.numel(), ".");
  }
  const Matrix x(logits, type);
  Tensor out = empty(logits.sizes(), logits, type);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* result = out.mutable_data_ptr<T>();
    for_rows(rows, vocabulary, [&](int64_t begin, int64_t end) {
      thread_local Counts counts;
      counts.seen.resize(std::max<size_t>(counts.seen.size(), vocabulary));
      counts.output.resize(std::max<size_t>(counts.output.size(), vocabulary));
      for (int64_t r = begin; r < end; ++r) {
        const T* from = x.row<T>(r);
        T* to = result + r * vocabulary;
        std::copy(from, from + vocabulary, to);
        for (int64_t i = start[r]; i < start[r + 1]; ++i) {
          if (tokens[i] < 0 || tokens[i] >= vocabulary) continue;
          counts.seen[tokens[i]] = 1;
          counts.output[tokens[i]] += i - start[r] >= prompt[r];
        }
        for (int64_t i = start[r]; i < start[r + 1]; ++i) {
          const int64_t token = tokens[i];
          if (token < 0 || token >= vocabulary || !counts.seen[token]) continue;
          const double old = from[token];
          double value = old > 0 ? old / factor[r] : old * factor[r];
          if (counts.output[token]) value -= each[r] * counts.output[token] + once[r];
          to[token] = static_cast<T>(value);
          counts.seen[token] = 0;
          counts.output[token] = 0;
        }
        for (int64_t i = ends_start[r]; i < ends_start[r + 1]; ++i) {
          if (ends[i] >= 0 && ends[i] < vocabulary) to[ends[i]] = -std::numeric_limits<T>::infinity();
        }
      }
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("sample", &sample);
  m.impl("penalize", &penalize);
}

}  // namespace toolkit::sample_op
