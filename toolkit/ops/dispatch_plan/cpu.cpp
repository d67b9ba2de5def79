// dispatch_plan on CPU: a stable counting sort of (token, k) pairs by expert.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace toolkit::dispatch_plan_op {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan(const Tensor& topk_ids, int64_t num_experts, int64_t tile) {
  TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.scalar_type() == at::kLong && num_experts >= 0 && tile >= 1,
              "dispatch_plan needs int64 topk_ids [T, K], num_experts >= 0 and tile >= 1, got ", topk_ids.scalar_type(), " ",
              topk_ids.sizes(), ", ", num_experts, " and ", tile, ".");
  const Tensor ids = topk_ids.contiguous();
  const int64_t pairs = ids.numel(), bound = pairs / tile + std::min(num_experts, pairs);
  Tensor order = at::empty({pairs}, ids.options()), rows = at::empty(ids.sizes(), ids.options());
  Tensor offsets = at::empty({num_experts + 1}, ids.options()), tiles = at::empty({bound, 2}, ids.options());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  auto expert_of = [&](int64_t pair) { return id[pair] >= 0 && id[pair] < num_experts ? id[pair] : num_experts; };

  std::vector<int64_t> next(num_experts + 2, 0);  // the next row of each expert; skipped pairs count as expert E
  for (int64_t pair = 0; pair < pairs; ++pair) ++next[expert_of(pair) + 1];
  for (int64_t e = 0; e <= num_experts; ++e) next[e + 1] += next[e];
  int64_t* begin = offsets.mutable_data_ptr<int64_t>();
  std::copy_n(next.begin(), num_experts + 1, begin);

  int64_t *pair_of = order.mutable_data_ptr<int64_t>(), *row_of = rows.mutable_data_ptr<int64_t>();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t e = expert_of(pair), row = next[e]++;
    pair_of[row] = pair;
    row_of[pair] = e < num_experts ? row : -1;
  }

  int64_t *next_tile = tiles.mutable_data_ptr<int64_t>(), *const end = next_tile + 2 * bound;
  auto add_tile = [&](int64_t expert, int64_t row) {
    *next_tile++ = expert;
    *next_tile++ = row;
  };
  for (int64_t e = 0; e < num_experts; ++e)
    for (int64_t row = begin[e]; row < begin[e + 1]; row += tile) add_tile(e, row);
  while (next_tile < end) add_tile(num_experts, begin[num_experts]);
  return {order, rows, offsets, tiles};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("dispatch_plan", &dispatch_plan); }

}  // namespace toolkit::dispatch_plan_op
