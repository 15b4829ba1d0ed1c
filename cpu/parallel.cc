#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace flashjax {

ParallelFor OwnThreads(int threads) {
  if (threads <= 0) threads = std::max(1u, std::thread::hardware_concurrency());
  const auto run = [threads](int64_t items, const std::function<void(int64_t)>& body) {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::exception_ptr error;
    const auto work = [&] {
      try {
        for (int64_t i = next++; i < items; i = next++) body(i);
      } catch (...) {
        next = items;
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    try {
      for (int64_t i = 1; i < std::min<int64_t>(threads, items); ++i) others.emplace_back(work);
    } catch (const std::exception&) {
      // No more threads to be had: those that there are do the work.
    }
    work();
    for (std::thread& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
  };
  return {run, threads};
}

}  // namespace flashjax
