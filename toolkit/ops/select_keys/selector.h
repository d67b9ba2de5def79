// The k best of a row's keys: those of the highest score, and of equal scores the lower position. Keys are offered in
// ascending order of position, in parts if need be; the selected set does not depend on the parts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace toolkit::select_keys_op {

template <typename T>
struct Candidate {
  T score;
  int64_t position;
};

template <typename T>
inline bool better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.score > b.score || (a.score == b.score && a.position < b.position);
}

template <typename T>
class Selector {
 public:
  void reset(int64_t k) {
    k_ = k;
    kept_.clear();
    kept_.reserve(2 * k + kSpare);
    full_ = false;
  }
  void offer(const T* scores, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      // NaN ranks as the lowest score.
      const T score = scores[i] == scores[i] ? scores[i] : -std::numeric_limits<T>::infinity();
      if (full_ && !(score > floor_)) continue;  // whoever is as good has a lower position
      kept_.push_back({score, first + i});
      if (static_cast<int64_t>(kept_.size()) >= 2 * k_ + kSpare) shrink();
    }
  }
  void absorb(const Selector& later) { kept_.insert(kept_.end(), later.kept_.begin(), later.kept_.end()); }
  // The selected positions, ascending, -1 from there to `width`.
  void write(int64_t* out, int64_t width) {
    if (static_cast<int64_t>(kept_.size()) > k_) shrink();
    const int64_t count = std::min<int64_t>(kept_.size(), width);
    for (int64_t i = 0; i < count; ++i) out[i] = kept_[i].position;
    std::sort(out, out + count);
    std::fill(out + count, out + width, int64_t(-1));
  }

 private:
  static constexpr int64_t kSpare = 64;

  void shrink() {
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), better<T>);
    kept_.resize(k_);
    floor_ = kept_[k_ - 1].score;
    full_ = true;
  }

  std::vector<Candidate<T>> kept_;
  int64_t k_ = 0;
  bool full_ = false;
  T floor_ = 0;  // the lowest score that is kept
};

}  // namespace toolkit::select_keys_op
