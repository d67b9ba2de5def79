// What kernels share that give out their own work: tasks for whichever thread is free, and a thread's memory.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "team.h"

namespace toolkit::threads {

// Bodies come as references to functions, not as template arguments: each is compiled once, and not once for every way
// to run it.

// body(task) for every task below `count`, on at most `workers` threads: those of the running step's team, or torch's.
// Each takes the next task when it is free: only who computes a task varies, so a task must not depend on that.
__attribute__((noinline)) inline void run_tasks(int64_t count, int64_t workers,
                                                c10::function_ref<void(int64_t)> body) {
  if (workers <= 1 || count <= 1 || Team::in_task()) {
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
  if (Team* const team = Team::of_this_thread()) return team->run(count, std::min(count, workers), body);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(count, workers), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
  });
}

// body(first, last) over parts of [begin, end) of at least `grain`, as at::parallel_for has it.
__attribute__((noinline)) inline void parallel_for(int64_t begin, int64_t end, int64_t grain,
                                                   c10::function_ref<void(int64_t, int64_t)> body) {
  if (begin >= end) return;
  if (Team::in_task()) return body(begin, end);
  Team* const team = Team::of_this_thread();
  if (team == nullptr) return at::parallel_for(begin, end, grain, body);
  const int64_t count = end - begin, threads = at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(count / std::max<int64_t>(1, grain), 1, threads);
  if (parts == 1) return body(begin, end);
  const int64_t size = (count + parts - 1) / parts;
  team->run(parts, parts, [&](int64_t part) {
    const int64_t first = begin + part * size, last = std::min(end, first + size);
    if (first < last) body(first, last);
  });
}

// Uninitialised, aligned memory that grows and is kept for the next call of the thread.
template <typename T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (count > size_) {
      memory_.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

// A thread's own memory for `Slot`; what it held is lost. Slot 0 is the packed weights of a GEMM.
template <typename T, int Slot = 0>
inline T* scratch(int64_t count) {
  static thread_local Scratch<T> memory;
  return memory.reserve(count);
}

}  // namespace toolkit::threads
