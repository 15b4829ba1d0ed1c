// XLA's thread pool as the CPU code's ParallelFor.
#ifndef FLASHJAX_BINDINGS_FFI_THREAD_POOL_H_
#define FLASHJAX_BINDINGS_FFI_THREAD_POOL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "cpu/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace flashjax {

// The calling thread works too and waits only for items that a thread has begun, so a busy pool
// delays nothing and the caller may itself be one of its threads. Tasks that come late find no
// items left. `pool` must outlive the result.
inline ParallelFor PoolThreads(::xla::ffi::ThreadPool& pool) {
  struct State {
    int64_t items;
    const std::function<void(int64_t)>* body;  // alive while items are left
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
    std::exception_ptr error;

    void Work() {
      int64_t mine = 0;
      for (int64_t i = next++; i < items; i = next++, ++mine) {
        try {
          (*body)(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
      }
      if (mine == 0) return;
      const std::lock_guard<std::mutex> lock(mutex);
      done += mine;
      if (done == items) all_done.notify_one();
    }
  };
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const auto run = [&pool, threads](int64_t items, const std::function<void(int64_t)>& body) {
    const auto state = std::make_shared<State>();
    state->items = items;
    state->body = &body;
    const int64_t helpers = std::min(threads, items) - 1;
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Work(); });
    state->Work();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done == items; });
    if (state->error) std::rethrow_exception(state->error);
  };
  return {run, static_cast<int>(threads)};
}

}  // namespace flashjax

#endif  // FLASHJAX_BINDINGS_FFI_THREAD_POOL_H_
