// What kernels share that give out their own work: tasks for whichever thread is free, and a thread's memory.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

namespace toolkit::threads {

// body(task) for every task below `count`, on at most `workers` of torch's threads. Each takes the next task when it is
// free: only who computes a task varies, so a task must not depend on that.
template <typename Body>
inline void run_tasks(int64_t count, int64_t workers, const Body& body) {
  if (workers <= 1 || count <= 1) {
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(count, workers), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
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
