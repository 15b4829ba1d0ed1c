// How the CPU code spreads independent items over threads, whoever owns them.
#ifndef FLASHJAX_CPU_PARALLEL_H_
#define FLASHJAX_CPU_PARALLEL_H_

#include <cstdint>
#include <functional>

namespace flashjax {

struct ParallelFor {
  // Calls body(i) once for every i in [0, items), in any order, and returns when all are done.
  std::function<void(int64_t items, const std::function<void(int64_t item)>& body)> run;
  int threads;  // how many may work at a time
};

// On the calling thread and up to threads - 1 others; 0: as many as the machine has cores. What a
// body throws is thrown again on the calling thread.
ParallelFor OwnThreads(int threads);

}  // namespace flashjax

#endif  // FLASHJAX_CPU_PARALLEL_H_
