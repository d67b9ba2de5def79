// The threads of a step: they stay with it from its first kernel to its last, and whoever is free takes the next task.
//
// The thread that runs the step never waits for another to begin: it takes tasks itself until none is left, and then
// waits only for those that others have begun. On cores that are shared with other programs a thread that is not
// scheduled costs nothing, where a barrier of all threads costs a time slice at every kernel. Between kernels the others
// watch for work for as long as a short serial op takes, then sleep.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/FunctionRef.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace toolkit::threads {

class Team {
 public:
  // The team of the step that this thread runs; null outside of a step.
  static Team* of_this_thread() { return current(); }

  // Whether this thread is in a task: one that would share out work does it itself.
  static bool in_task() { return in_task_flag(); }

  // Makes the team this thread's for as long as it lives, unless another thread has it: then kernels use torch's threads.
  class Scope {
   public:
    Scope() : team_(shared()), before_(current()) {
      if (team_ == nullptr || before_ != nullptr || !team_->taken_.try_lock()) {
        team_ = nullptr;
        return;
      }
      team_->grow(at::get_num_threads() - 1);
      current() = team_;
    }
    ~Scope() {
      if (team_ == nullptr) return;
      current() = before_;
      team_->taken_.unlock();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Team *team_, *before_;
  };

  // body(task) for every task below `count`, on at most `workers` threads, the calling one among them.
  void run(int64_t count, int64_t workers, c10::function_ref<void(int64_t)> body) {
    body_ = body;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    // From here on threads may come in; none is inside, since the last run waited for them.
    state_.store(kOpen + static_cast<uint64_t>(workers - 1) * kSeat, std::memory_order_release);
    turn_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) turn_.notify_all();
    work();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int64_t i = 0; (state_.load(std::memory_order_acquire) & kInside) != 0; ++i) wait_a_little(i);
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  // state_: how many threads are inside, how many more may come in, and whether any may.
  static constexpr uint64_t kInside = (uint64_t{1} << 24) - 1, kSeat = uint64_t{1} << 24, kOpen = uint64_t{1} << 62;
  static constexpr uint64_t kSeats = kOpen - kSeat;
  // Looks for work (some 0.3 to 1 ms) before a thread sleeps: serial ops between two kernels, and the host between two
  // steps, take less; to wake a thread costs as much as a small kernel.
  static constexpr int64_t kWatch = 20000;

  static Team*& current() {
    static thread_local Team* team = nullptr;
    return team;
  }
  static bool& in_task_flag() {
    static thread_local bool flag = false;
    return flag;
  }

  // One for the process, made again after a fork, which no thread but the caller's survives.
  static Team* shared() {
    static std::atomic<Team*> team{new Team};
#ifdef __linux__
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      team.store(new Team);
      current() = nullptr;
    });
    (void)registered;
#endif
    return team.load(std::memory_order_acquire);
  }

  static void wait_a_little(int64_t looks) {
    if (looks > 2000) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
  }

  // Threads are never joined: they hold nothing, and sleep when no step runs.
  void grow(int64_t count) {
    for (; threads_ < count; ++threads_) std::thread([this] { serve(); }).detach();
  }

  void serve() {
    for (uint32_t seen = 0;;) {
      uint32_t turn = turn_.load(std::memory_order_acquire);
      for (int64_t i = 0; turn == seen && i < kWatch; ++i) {
        wait_a_little(i);
        turn = turn_.load(std::memory_order_acquire);
      }
      if (turn == seen) {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        turn_.wait(seen, std::memory_order_seq_cst);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        continue;
      }
      seen = turn;
      if (!enter()) continue;
      work();
      state_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  bool enter() {
    uint64_t state = state_.load(std::memory_order_acquire);
    while ((state & kOpen) != 0 && (state & kSeats) != 0)
      if (state_.compare_exchange_weak(state, state - kSeat + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void work() {
    in_task_flag() = true;
    try {
      for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body_(task);
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> guard(failing_);
      if (error_ == nullptr) error_ = std::current_exception();
    }
    in_task_flag() = false;
  }

  std::mutex taken_, failing_;
  std::atomic<uint64_t> state_{0};
  std::atomic<uint32_t> turn_{0};
  std::atomic<int32_t> sleeping_{0};
  std::atomic<int64_t> next_{0};
  c10::function_ref<void(int64_t)> body_;
  int64_t count_ = 0, threads_ = 0;
  std::exception_ptr error_;
};

}  // namespace toolkit::threads
