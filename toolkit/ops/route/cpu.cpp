// route and route_backward on CPU: a token at a time, its bits from its own logits alone.
#include "activations.h"

namespace toolkit::route_op {

using namespace toolkit::rows;

constexpr int64_t kWeight = 8;  // an exp and a place among the best, against an add

// p = score(x) for one row.
template <typename T>
void softmax(const T* x, int64_t n, T* p) {
  const Vec<T> max(largest(x, n));
  Sum<T> sum;
  accumulate<T>(n, [&](int slot, int64_t i, int64_t lanes) {
    const auto e = elementary::exp(Vec<T>::loadu(x + i, lanes) - max);
    e.store(p + i, lanes);
    sum.part[slot] = sum.part[slot] + filled(e, lanes, T(0));
  });
  const Vec<T> total(static_cast<T>(sum.total()));
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) { (Vec<T>::loadu(p + i, lanes) / total).store(p + i, lanes); });
}

template <typename T, typename F>
void score_row(const F& f, const T* x, int64_t n, T* p) {
  for_vectors<T>(n, [&](int64_t i, int64_t lanes) { f.value(Vec<T>::loadu(x + i, lanes)).store(p + i, lanes); });
}

// body(score): score(x, n, p) writes p of one row.
template <typename T, typename Body>
void with_score(c10::string_view name, const Body& body) {
  if (name == "softmax") return body(softmax<T>);
  activations::with_plain_kind({name.data(), name.size()}, [&](auto f) {
    body([f](const T* x, int64_t n, T* p) { score_row(f, x, n, p); });
  });
}

// The best `count` of what is offered, best first; of equal ones the first offered. NaN counts as -inf.
template <typename T>
struct Best {
  explicit Best(int64_t count) : values(count), places(count) {}
  void clear() { found = 0; }
  void offer(T value, int64_t place) {
    if (value != value) value = -std::numeric_limits<T>::infinity();
    const int64_t count = values.size();
    if (found == count && !(value > values[count - 1])) return;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && value > values[at - 1]; --at) {
      values[at] = values[at - 1];
      places[at] = places[at - 1];
    }
    values[at] = value;
    places[at] = place;
  }
  std::vector<T> values;
  std::vector<int64_t> places;
  int64_t found = 0;
};

// Which experts may be chosen, and the choice among them.
template <typename T>
struct Choice {
  Choice(int64_t k, int64_t groups, int64_t kept, int64_t best, int64_t members)
      : experts(k), runs(kept), within(best), allowed(groups, 1), members(members) {}

  void choose(const T* values, int64_t* ids) {
    const int64_t groups = allowed.size();
    if (int64_t(runs.values.size()) < groups) keep_groups(values, groups);
    experts.clear();
    for (int64_t g = 0; g < groups; ++g)
      if (allowed[g])
        for (int64_t e = g * members; e < (g + 1) * members; ++e) experts.offer(values[e], e);
    std::copy(experts.places.begin(), experts.places.end(), ids);
  }

 private:
  void keep_groups(const T* values, int64_t groups) {
    runs.clear();
    for (int64_t g = 0; g < groups; ++g) {
      within.clear();
      for (int64_t e = g * members; e < (g + 1) * members; ++e) within.offer(values[e], e);
      T sum(0);
      for (int64_t e : within.places) sum += values[e];
      runs.offer(sum, g);
    }
    std::fill(allowed.begin(), allowed.end(), 0);
    for (int64_t g : runs.places) allowed[g] = 1;
  }

  Best<T> experts, runs, within;
  std::vector<char> allowed;
  int64_t members;
};

void check_ids(const char* op, const Tensor& ids, int64_t tokens, int64_t experts) {
  TORCH_CHECK(ids.dim() == 2 && ids.size(0) == tokens && ids.scalar_type() == at::kLong, op, ": ids have shape ",
              ids.sizes(), " and dtype ", ids.scalar_type(), "; allowed are int64 [", tokens, ", K].");
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < experts, op, ": ids hold ", id[i], "; allowed are 0 to ", experts - 1, ".");
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& chosen, int64_t k, c10::string_view score,
                                   int64_t groups, int64_t kept, int64_t best, bool normalise, double eps,
                                   double scale) {
  const auto type = compute_type(logits, "route");
  check_row("route", "bias", bias, logits);
  const int64_t count = logits.size(-1), members = groups > 0 ? count / groups : 0;
  TORCH_CHECK(logits.dim() == 2 && groups >= 1 && count % groups == 0 && kept >= 1 && kept <= groups && best >= 1 &&
                  best <= members && k >= 1 && k <= kept * members,
              "route: k is ", k, ", groups, kept and best are ", groups, ", ", kept, " and ", best, " for logits ",
              logits.sizes(), "; allowed are equal groups of [T, E], and no more than there are.");
  const Matrix x(logits, type);
  Tensor weights = empty({x.count, k}, logits, type);
  Tensor ids = chosen ? chosen->clone(at::MemoryFormat::Contiguous) : empty({x.count, k}, logits, at::kLong);
  if (chosen) {
    check_ids("route", ids, x.count, count);
    TORCH_CHECK(ids.size(1) == k, "route: chosen has shape ", ids.sizes(), "; k is ", k, ".");
  }
  const Tensor shift = bias ? bias->to(type).contiguous() : Tensor();
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* add = bias ? shift.const_data_ptr<T>() : nullptr;
    T* to_weights = weights.mutable_data_ptr<T>();
    int64_t* to_ids = ids.mutable_data_ptr<int64_t>();
    with_score<T>(score, [&](auto scores_of) {
      for_rows(x.count, count * kWeight, [&](int64_t begin, int64_t end) {
        std::vector<T> p(count), values(bias ? count : 0);
        Choice<T> choice(k, groups, kept, best, members);
        for (int64_t t = begin; t < end; ++t) {
          scores_of(x.row<T>(t), count, p.data());
          int64_t* id = to_ids + t * k;
          for (size_t e = 0; e < values.size(); ++e) values[e] = p[e] + add[e];
          if (!chosen) choice.choose(bias ? values.data() : p.data(), id);
          T total(0);
          for (int64_t i = 0; i < k; ++i) total += p[id[i]];
          total += static_cast<T>(eps);
          for (int64_t i = 0; i < k; ++i)
            to_weights[t * k + i] = (normalise ? p[id[i]] / total : p[id[i]]) * static_cast<T>(scale);
        }
      });
    });
  });
  return {weights, ids};
}

// The gradient to the scores of one row: `d` at the chosen, through the sum where `normalise`, scattered over zeros.
template <typename T>
void scatter_gradient(const T* grad, const int64_t* id, int64_t k, const T* p, bool normalise, T eps, T scale, T* to) {
  T total(0), mean(0);
  if (normalise) {
    for (int64_t i = 0; i < k; ++i) total += p[id[i]];
    total += eps;
    for (int64_t i = 0; i < k; ++i) mean += grad[i] * scale * (p[id[i]] / total);
  }
  for (int64_t i = 0; i < k; ++i) to[id[i]] = normalise ? (grad[i] * scale - mean) / total : grad[i] * scale;
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& ids, c10::string_view score, bool normalise,
                double eps, double scale) {
  const auto type = compute_type(logits, "route_backward");
  const Matrix x(logits, type);
  const Tensor chosen = ids.contiguous(), d = grad.to(type).contiguous();
  check_ids("route_backward", chosen, x.count, x.width);
  check_equal_shapes("route_backward", "grad", d, "ids", chosen);
  Tensor out = empty(logits.sizes(), logits, type);
  const int64_t k = chosen.size(1), n = x.width;
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* result = out.mutable_data_ptr<T>();
    const int64_t* id = chosen.const_data_ptr<int64_t>();
    const T* from = d.const_data_ptr<T>();
    auto for_tokens = [&](auto&& token) {
      for_rows(x.count, n * kWeight, [&](int64_t begin, int64_t end) {
        std::vector<T> p(n);
        for (int64_t t = begin; t < end; ++t) {
          T* to = result + t * n;
          std::fill_n(to, n, T(0));
          token(x.row<T>(t), p.data(), to, from + t * k, id + t * k);
        }
      });
    };
    if (score == "softmax") {
      for_tokens([&](const T* row, T* p, T* to, const T* g, const int64_t* at) {
        softmax(row, n, p);
        scatter_gradient<T>(g, at, k, p, normalise, eps, scale, to);
        T mean(0);
        for (int64_t i = 0; i < k; ++i) mean += to[at[i]] * p[at[i]];
        const Vec<T> middle(mean);
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          (Vec<T>::loadu(p + i, lanes) * (Vec<T>::loadu(to + i, lanes) - middle)).store(to + i, lanes);
        });
      });
      return;
    }
    activations::with_plain_kind({score.data(), score.size()}, [&](auto f) {
      for_tokens([&](const T* row, T* p, T* to, const T* g, const int64_t* at) {
        score_row(f, row, n, p);
        scatter_gradient<T>(g, at, k, p, normalise, eps, scale, to);
        for_vectors<T>(n, [&](int64_t i, int64_t lanes) {
          const auto slope = f.both(Vec<T>::loadu(row + i, lanes)).derivative;
          (Vec<T>::loadu(to + i, lanes) * slope).store(to + i, lanes);
        });
      });
    });
  });
  return cast(out, logits.scalar_type());
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) {
  m.impl("route", &forward);
  m.impl("route_backward", &backward);
}

}  // namespace toolkit::route_op
