// dispatch_plan on CPU: a stable counting sort of slots by expert.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace toolkit::dispatch_plan_op {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan(const Tensor& experts, int64_t num_experts, int64_t tile) {
  TORCH_CHECK(experts.dim() == 2 && experts.scalar_type() == at::kLong && num_experts >= 0 && tile >= 1,
              "dispatch_plan: got experts ", experts.sizes(), " of ", experts.scalar_type(), ", num_experts ",
              num_experts, " and tile ", tile,
              "; allowed are int64 [T, K], 0 or more experts and a tile of 1 or more.");
  const Tensor ids = experts.contiguous();
  const int64_t slots = ids.numel(), bound = slots / tile + std::min(num_experts, slots);
  Tensor order = at::empty({slots}, ids.options()), rows = at::empty(ids.sizes(), ids.options());
  Tensor offsets = at::empty({num_experts + 1}, ids.options()), tiles = at::empty({bound, 2}, ids.options());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  auto group = [&](int64_t slot) { return id[slot] >= 0 && id[slot] < num_experts ? id[slot] : num_experts; };

  std::vector<int64_t> next(num_experts + 2, 0);  // the next row of each expert; skipped slots are one more expert
  for (int64_t slot = 0; slot < slots; ++slot) ++next[group(slot) + 1];
  for (int64_t e = 0; e <= num_experts; ++e) next[e + 1] += next[e];
  int64_t* begin = offsets.mutable_data_ptr<int64_t>();
  std::copy_n(next.begin(), num_experts + 1, begin);

  int64_t *slot_of = order.mutable_data_ptr<int64_t>(), *row_of = rows.mutable_data_ptr<int64_t>();
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t e = group(slot), row = next[e]++;
    slot_of[row] = slot;
    row_of[slot] = e < num_experts ? row : -1;
  }

  int64_t *pair = tiles.mutable_data_ptr<int64_t>(), *const end = pair + 2 * bound;
  auto add_tile = [&](int64_t expert, int64_t row) {
    *pair++ = expert;
    *pair++ = row;
  };
  for (int64_t e = 0; e < num_experts; ++e)
    for (int64_t row = begin[e]; row < begin[e + 1]; row += tile) add_tile(e, row);
  while (pair < end) add_tile(num_experts, begin[num_experts]);
  return {order, rows, offsets, tiles};
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("dispatch_plan", &dispatch_plan); }

}  // namespace toolkit::dispatch_plan_op
