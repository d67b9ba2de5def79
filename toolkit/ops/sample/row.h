// One row of sampling: weights, filters and the sample. Work is in float64; selection compares the logits themselves.
//
// Nothing here sorts the vocabulary. Top-k bisects a threshold on the ordered bits of the float, a pass of counting
// a step. Top-p adds weights into buckets of equal width in log-probability, which leaves the few tokens of one
// bucket (or those of top-k) to be resolved exactly. The running sum is kept per block, so that sampling looks into
// one block only.
#pragma once
#include "rows.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace toolkit::sample_op {

using namespace toolkit::rows;

constexpr int64_t kBlock = 256;           // columns whose sum is one entry of the running sum
constexpr int kBuckets = 1024;            // of log-probability; the last one takes the rest
constexpr double kBucketsPerNat = 32.0;
constexpr size_t kFew = 48;               // candidates that are sorted rather than split
constexpr double kLeastMass = std::numeric_limits<double>::min();

// The top 53 of the first 64 bits of Philox4x32-10, as a multiple of 2^-53 in [0, 1).
inline double uniform(uint64_t seed, uint64_t step) {
  uint32_t c[4] = {static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof c);
  }
  return static_cast<double>((uint64_t{c[0]} << 21) | (c[1] >> 11)) * 0x1p-53;
}

// The first index of `value`, or of a NaN if that is what it is.
template <typename T>
int64_t first(const T* x, int64_t n, T value) {
  int64_t i = 0;
  if (value != value) {
    while (i < n - 1 && x[i] == x[i]) ++i;
  } else {
    while (i < n - 1 && x[i] != value) ++i;
  }
  return i;
}

// Floats as integers in the same order (-0 below +0, which the comparisons made with them do not notice).
template <typename T>
struct Ordered {
  using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr Key kMagnitude = std::numeric_limits<Key>::max();
  static Key key(T x) {
    const Key bits = std::bit_cast<Key>(x);
    return bits < 0 ? bits ^ kMagnitude : bits;
  }
  static T value(Key key) { return std::bit_cast<T>(key < 0 ? key ^ kMagnitude : key); }
};

// A threshold that exactly the k largest of a row without NaN reach, and what equals the k-th.
template <typename T>
T top_k_threshold(const T* x, int64_t n, int64_t k, T max) {
  using O = Ordered<T>;
  // At least k reach `low`, fewer reach `high`.
  typename O::Key low = O::key(-std::numeric_limits<T>::infinity()), high = O::key(max) + 1;
  while (high - 1 > low) {
    const auto middle = (low & high) + ((low ^ high) >> 1);  // the mean, without overflow
    const T threshold = O::value(middle);
    int32_t count = 0;  // V is below 2^31
    for (int64_t i = 0; i < n; ++i) count += x[i] >= threshold;
    if (count == k) return threshold;
    (count > k ? low : high) = middle;
  }
  return O::value(low);
}

// Memory that a thread keeps: fresh memory of this size costs more than the arithmetic.
struct Scratch {
  std::vector<double> weights, sums, masses;
  std::vector<uint16_t> buckets;
  std::vector<int32_t> ids, above, equal, below;
};

template <typename T>
struct Row {
  const T* x;
  int64_t n;  // V
  Scratch& scratch;
  double* w;       // [padded] weights, 0 for what is out
  int64_t blocks;  // of kBlock, the last one padded with weights of 0

  Row(const T* x, int64_t n, Scratch& scratch) : x(x), n(n), scratch(scratch), blocks((n + kBlock - 1) / kBlock) {
    scratch.weights.resize(std::max<size_t>(scratch.weights.size(), blocks * kBlock));
    scratch.sums.resize(std::max<size_t>(scratch.sums.size(), blocks));
    w = scratch.weights.data();
  }

  // w = exp(x/T - top), 0 where x < least; `bucketed` also notes the bucket of each.
  void weigh(double temperature, double top, T least, bool limited, bool bucketed) {
    if (bucketed) scratch.buckets.resize(std::max<size_t>(scratch.buckets.size(), blocks * kBlock));
    uint16_t* bucket = scratch.buckets.data();
    constexpr double kLowest = -std::numeric_limits<double>::infinity();
    constexpr int64_t kLanes = Vec<double>::size();
    for (int64_t start = 0; start < blocks * kBlock; start += kBlock) {
      const int64_t count = std::min(kBlock, n - start);
      double* to = w + start;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(x[start + i]) / temperature - top;
      for (int64_t i = count; i < kBlock; ++i) to[i] = kLowest;
      if (limited) {
        for (int64_t i = 0; i < count; ++i) to[i] = x[start + i] >= least ? to[i] : kLowest;
      }
      if (bucketed) {
        for (int64_t i = 0; i < kBlock; ++i) {
          bucket[start + i] = static_cast<int32_t>(std::min(to[i] * -kBucketsPerNat, kBuckets - 1.0));
        }
      }
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        bool any = !limited;
        for (int64_t lane = i; !any && lane < i + kLanes; ++lane) any = to[lane] != kLowest;
        (any ? Vec<double>::loadu(to + i).exp() : Vec<double>(0)).store(to + i);
      }
    }
  }

  // Running sums of the weights of at least `least`, which alone are left, by block; their total.
  double accumulate_blocks(double least) {
    double running = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      double* from = w + block * kBlock;
      double lane[8] = {};
      for (int64_t i = 0; i < kBlock; i += 8) {
        for (int64_t j = 0; j < 8; ++j) {
          const double kept = from[i + j] >= least ? from[i + j] : 0.0;
          from[i + j] = kept;
          lane[j] += kept;
        }
      }
      running += ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
      scratch.sums[block] = running;
    }
    return running;
  }

  // Leaves the fewest most probable tokens that reach `share` of the weights, of those that reach `least`.
  void keep_nucleus_among(double share, T least) {
    const double target = std::max(share, kLeastMass) * accumulate_blocks(0.0);
    collect([&](int64_t i) { return x[i] >= least; });
    resolve(0.0, target);
  }

  // The same of all, which are in buckets.
  void keep_nucleus(double share) {
    const double target = std::max(share, kLeastMass) * accumulate_blocks(0.0);
    // Two sets of buckets taken in turn, so that neighbours of one bucket do not wait for each other.
    scratch.masses.assign(2 * kBuckets, 0.0);
    double *even = scratch.masses.data(), *odd = even + kBuckets;
    const uint16_t* bucket = scratch.buckets.data();
    for (int64_t i = 0; i < blocks * kBlock; i += 2) {
      even[bucket[i]] += w[i];
      odd[bucket[i + 1]] += w[i + 1];
    }
    double before = 0.0;
    int last = 0;
    for (; last < kBuckets; ++last) {
      const double mass = even[last] + odd[last];
      if (before + mass >= target) break;
      before += mass;
    }
    if (last == kBuckets) return;  // the buckets' sums, rounded otherwise, fall short of the whole
    collect([&](int64_t i) { return bucket[i] == last; });
    for (int64_t i = 0; i < blocks * kBlock; ++i) w[i] = bucket[i] > last ? 0.0 : w[i];
    resolve(before, target);
  }

  // scratch.ids = those chosen, ascending.
  template <typename Choose>
  void collect(const Choose& chosen) {
    auto& ids = scratch.ids;
    ids.resize(n);
    size_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      ids[found] = static_cast<int32_t>(i);
      found += chosen(i);
    }
    ids.resize(found);
  }

  // The same within scratch.ids, given the weights before them: splits by a pivot until few are left.
  void resolve(double before, double target) {
    auto &ids = scratch.ids, &above = scratch.above, &equal = scratch.equal, &below = scratch.below;
    for (int rounds = 0; ids.size() > kFew && rounds < 64; ++rounds) {
      const T a = x[ids.front()], b = x[ids[ids.size() / 2]], c = x[ids.back()];
      const T pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
      above.clear(), equal.clear(), below.clear();
      double mass = 0.0;
      for (const int32_t id : ids) {
        if (x[id] > pivot) {
          above.push_back(id);
          mass += w[id];
        } else {
          (x[id] == pivot ? equal : below).push_back(id);
        }
      }
      if (before + mass >= target) {
        drop(equal, 0);
        drop(below, 0);
        ids.swap(above);
        continue;
      }
      before += mass;
      if (const size_t kept = walk(equal, before, target); kept < equal.size() || before >= target) {
        drop(equal, kept);
        drop(below, 0);
        return;
      }
      ids.swap(below);
    }
    std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
    drop(ids, walk(ids, before, target));
  }

  // How many of `ids`, in order, are in: those before which the weights fall short.
  size_t walk(const std::vector<int32_t>& ids, double& before, double target) const {
    size_t kept = 0;
    for (; kept < ids.size() && before < target; ++kept) before += w[ids[kept]];
    return kept;
  }

  void drop(const std::vector<int32_t>& ids, size_t kept) {
    for (size_t i = kept; i < ids.size(); ++i) w[ids[i]] = 0.0;
  }

  // The first token at which the running sum exceeds u times the total, given the sums by block.
  int64_t sample(double u, double total) const {
    const double target = u * total;  // below the total, as u <= 1 - 2^-53
    const auto& sums = scratch.sums;
    const int64_t block = std::upper_bound(sums.begin(), sums.begin() + blocks, target) - sums.begin();
    const int64_t start = block * kBlock, end = std::min(n, start + kBlock);
    double running = block ? sums[block - 1] : 0.0;
    int64_t last = start;
    for (int64_t i = start; i < end; ++i) {
      running += w[i];
      if (running > target) return i;
      if (w[i] > 0) last = i;
    }
    return last;  // the sum one by one, rounded otherwise, falls short of the block's
  }
};

}  // namespace toolkit::sample_op
