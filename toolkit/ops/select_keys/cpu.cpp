// Native selection of keys: scores of a tile of keys at a time, in float or double, and the k best of each row.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../attention/problem.h"
#include "dtypes.h"
#include "selector.h"

namespace toolkit::select_keys_op {

using attention_op::Dense;
using attention_op::Heads;
using attention_op::KeyTile;
using attention_op::kRowGroup;
using attention_op::kTile;
using attention_op::Layout;
using attention_op::padded;
using attention_op::RowMajor;
using attention_op::Sequence;
using attention_op::Vec;

constexpr int64_t kRows = 8;              // rows of a task, for which a tile of keys is packed once
constexpr int64_t kPart = 4096;           // keys of a task where there are fewer blocks of rows than threads
constexpr int64_t kSerialWork = 1 << 17;  // multiplications below which waking threads costs more

template <typename T>
struct Problem {
  Layout layout;  // query_heads, depth
  Heads<T> q, k, weights;
  T scale;
  int64_t topk, width;
  int64_t* out;  // [rows, width]
};

// Rows [begin, end) of a sequence and keys [first, last) of it.
struct Task {
  int64_t sequence, begin, end, first, last;
};

template <typename T>
struct Buffers {
  explicit Buffers(const Layout& p) {
    static thread_local threads::Scratch<T> memory;
    query = memory.reserve(kRows * p.query_heads * (p.depth + 1) + kTile * (2 * p.depth + kRowGroup + 1));
    weights = query + kRows * p.query_heads * p.depth;
    keys = weights + kRows * p.query_heads;
    room = keys + kTile * p.depth;
    products = room + kTile * p.depth;
    scores = products + kRowGroup * kTile;
  }
  T *query, *weights, *keys, *room, *products, *scores;
};

// scores[key] = sum over heads, ascending, of weight * max(0, scale * <query, key>), for keys [0, count) of a tile.
template <typename T>
void score_tile(const Problem<T>& f, const T* query, const T* weights, int64_t count, const Buffers<T>& b) {
  const Layout& p = f.layout;
  const int64_t lanes = padded<T>(count);
  const Vec<T> zero(T(0)), scale(f.scale);
  std::fill_n(b.scores, lanes, T(0));
  for (int64_t h = 0, height; h < p.query_heads; h += height) {
    height = attention_op::group_height(p.query_heads - h);
    attention_op::multiply<false>(b.products, kTile, height, RowMajor<T>{query + h * p.depth, p.depth},
                                  Dense<T>{b.keys, kTile}, lanes, 0, p.depth);
    for (int64_t i = 0; i < height; ++i) {
      const Vec<T> weight(weights[h + i]);
      for (int64_t lane = 0; lane < lanes; lane += Vec<T>::size()) {
        const Vec<T> product = scale * Vec<T>::loadu(b.products + i * kTile + lane);
        // at::vec's maximum passes NaN on; a negative product counts for nothing.
        const Vec<T> positive = at::vec::maximum(product, zero);
        at::vec::fmadd(weight, positive, Vec<T>::loadu(b.scores + lane)).store(b.scores + lane);
      }
    }
  }
}

// Offers the task's keys to the selectors of its rows, those up to each row's position.
template <typename T>
void select_task(const Problem<T>& f, const Task& task, Selector<T>* selectors) {
  const Layout& p = f.layout;
  const Sequence sequence = p.sequence(task.sequence);
  const Buffers<T> b(p);
  for (int64_t i = task.begin; i < task.end; ++i) {
    selectors[i - task.begin].reset(f.topk);
    for (int64_t h = 0; h < p.query_heads; ++h) {
      f.q.read(sequence.first_query + i, h, p.depth, b.query + ((i - task.begin) * p.query_heads + h) * p.depth);
      f.weights.read(sequence.first_query + i, h, 1, b.weights + (i - task.begin) * p.query_heads + h);
    }
  }
  int64_t row_indices[kTile];
  const T* pointers[kTile];
  const int64_t last = std::min(task.last, task.end + sequence.shift());
  for (int64_t first = task.first; first < last; first += kTile) {
    const int64_t count = std::min(kTile, last - first);
    const KeyTile tile{first / kTile, 0, count};
    attention_op::resolve_rows(p, sequence, tile, row_indices);
    attention_op::point_rows<T>(f.k, 0, tile, row_indices, p.depth, b.room, pointers);
    attention_op::transpose_tile(pointers, 0, count, p.depth, b.keys);
    for (int64_t i = task.begin; i < task.end; ++i) {
      const int64_t seen = std::min(count, i + sequence.shift() + 1 - first), r = i - task.begin;
      if (seen <= 0) continue;
      score_tile(f, b.query + r * p.query_heads * p.depth, b.weights + r * p.query_heads, seen, b);
      selectors[r].offer(b.scores, first, seen);
    }
  }
}

// A row that sees no more keys than are selected takes them all, unscored.
inline bool takes_all(int64_t position, int64_t topk, int64_t width, int64_t* out) {
  if (position + 1 > topk) return false;
  const int64_t count = std::clamp<int64_t>(position + 1, 0, width);
  for (int64_t i = 0; i < count; ++i) out[i] = i;
  std::fill(out + count, out + width, int64_t(-1));
  return true;
}

template <typename T>
void run(const Problem<T>& f, int64_t rows) {
  const Layout& p = f.layout;
  std::vector<Task> blocks;
  int64_t work = 0, longest = 0;
  for (int64_t s = 0; s < p.sequences; ++s) {
    const Sequence sequence = p.sequence(s);
    int64_t begin = std::clamp<int64_t>(f.topk - sequence.shift(), 0, sequence.queries);
    for (int64_t i = 0; i < begin; ++i)
      takes_all(i + sequence.shift(), f.topk, f.width, f.out + (sequence.first_query + i) * f.width);
    for (; begin < sequence.queries; begin += kRows) {
      const int64_t end = std::min(begin + kRows, sequence.queries), keys = end + sequence.shift();
      blocks.push_back({s, begin, end, 0, keys});
      work += (end - begin) * keys;
      longest = std::max(longest, keys);
    }
  }
  std::fill_n(f.out + p.query_offsets[p.sequences] * f.width, (rows - p.query_offsets[p.sequences]) * f.width,
              int64_t(-1));
  const int64_t workers = work * p.query_heads * p.depth < kSerialWork ? 1 : at::get_num_threads();
  const int64_t count = blocks.size(), parts = count < 2 * workers ? (longest + kPart - 1) / kPart : 1;
  const auto finish = [&](const Task& block, Selector<T>* selectors) {
    for (int64_t i = block.begin; i < block.end; ++i)
      selectors[i - block.begin].write(f.out + (p.query_offsets[block.sequence] + i) * f.width, f.width);
  };
  if (parts == 1) {
    threads::run_tasks(count, workers, [&](int64_t i) {
      static thread_local Selector<T> selectors[kRows];
      select_task(f, blocks[i], selectors);
      finish(blocks[i], selectors);
    });
    return;
  }
  std::vector<Selector<T>> all(count * parts * kRows);
  threads::run_tasks(count * parts, workers, [&](int64_t i) {
    Task task = blocks[i / parts];
    task.first = i % parts * kPart;
    task.last = std::min(task.last, task.first + kPart);
    select_task(f, task, all.data() + i * kRows);
  });
  for (int64_t block = 0; block < count; ++block) {
    Selector<T>* selectors = all.data() + block * parts * kRows;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t r = 0; r < kRows; ++r) selectors[r].absorb(selectors[part * kRows + r]);
    finish(blocks[block], selectors);
  }
}

inline const int64_t* indices(const at::Tensor& x, const char* name, int64_t dim) {
  TORCH_CHECK(x.scalar_type() == at::kLong && x.dim() == dim && x.is_contiguous() && x.is_cpu(), name, " is a ",
              x.dim(), "-dimensional tensor of ", x.scalar_type(), "; a contiguous ", dim,
              "-dimensional int64 tensor on the CPU is required.");
  return x.const_data_ptr<int64_t>();
}

inline Layout make_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& query_offsets,
                          const at::Tensor& kv_offsets, const at::Tensor& kv_lengths,
                          const std::optional<at::Tensor>& block_tables, int64_t block_size) {
  Layout p{};
  p.query_offsets = indices(query_offsets, "query_offsets", 1);
  p.kv_lengths = indices(kv_lengths, "kv_lengths", 1);
  p.sequences = kv_lengths.numel();
  p.query_heads = q.size(1);
  p.kv_heads = 1;
  p.depth = q.size(2);
  p.kv_rows = k.size(0);
  TORCH_CHECK(query_offsets.numel() == p.sequences + 1 && p.query_offsets[0] == 0 &&
                  p.query_offsets[p.sequences] <= q.size(0),
              "query_offsets must have ", p.sequences + 1, " values from 0 to at most ", q.size(0), ".");
  if (block_tables.has_value()) {
    p.block_tables = indices(*block_tables, "block_tables", 2);
    p.kv_offsets = p.kv_lengths;  // not looked at
    p.table_stride = block_tables->size(1);
    p.block_size = block_size;
    TORCH_CHECK(block_size > 0 && block_tables->size(0) == p.sequences, "block_tables must have a row for each of ",
                p.sequences, " sequences and a positive block_size.");
  } else {
    p.kv_offsets = indices(kv_offsets, "kv_offsets", 1);
    TORCH_CHECK(kv_offsets.numel() == p.sequences, "kv_offsets must have ", p.sequences, " values.");
  }
  for (int64_t s = 0; s < p.sequences; ++s) {
    const int64_t length = p.kv_lengths[s], offset = p.kv_offsets[s];
    const int64_t room = p.block_tables != nullptr ? p.table_stride * block_size : p.kv_rows - offset;
    TORCH_CHECK(p.query_offsets[s] <= p.query_offsets[s + 1] && 0 <= length && 0 <= offset && length <= room,
                "sequence ", s, " has queries ", p.query_offsets[s], " to ", p.query_offsets[s + 1], " and ", length,
                " keys from row ", offset, "; there is room for ", room, " keys.");
  }
  return p;
}

at::Tensor select_keys(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& weights,
                       const at::Tensor& query_offsets, const at::Tensor& kv_offsets, const at::Tensor& kv_lengths,
                       const std::optional<at::Tensor>& block_tables, int64_t block_size, int64_t topk, int64_t width,
                       double scale) {
  const auto type = q_in.scalar_type();
  TORCH_CHECK(dtypes::is_float(type) && k_in.scalar_type() == type && dtypes::is_float(weights.scalar_type()),
              "q and k must have one dtype of float32, float64, bfloat16 and float16, got ", type, " and ",
              k_in.scalar_type(), ".");
  TORCH_CHECK(q_in.dim() == 3 && k_in.dim() == 2 && weights.dim() == 2 && k_in.size(1) == q_in.size(2) &&
                  weights.size(0) == q_in.size(0) && weights.size(1) == q_in.size(1),
              "q, k and weights have shapes ", q_in.sizes(), ", ", k_in.sizes(), " and ", weights.sizes(),
              "; [T, H, D], [rows, D] and [T, H] are required.");
  const auto row_wise = [](const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous(); };
  const at::Tensor q = row_wise(q_in), k = row_wise(k_in);
  const Layout layout = make_layout(q, k, query_offsets, kv_offsets, kv_lengths, block_tables, block_size);
  at::Tensor out = at::empty({q.size(0), width}, query_offsets.options());
  const auto start = [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor w = weights.to(dtypes::upcast(type)).contiguous();
    run(Problem<T>{layout, Heads<T>{q.data_ptr(), q.stride(0), q.stride(1), type},
                   Heads<T>{k.data_ptr(), k.stride(0), 0, type},
                   Heads<T>{w.data_ptr(), w.size(1), 1, w.scalar_type()}, static_cast<T>(scale), topk, width,
                   out.data_ptr<int64_t>()},
        q.size(0));
  };
  if (type == at::kDouble)
    start(double{});
  else
    start(float{});
  return out;
}

TORCH_LIBRARY_IMPL(toolkit, CPU, m) { m.impl("select_keys", &select_keys); }

}  // namespace toolkit::select_keys_op
