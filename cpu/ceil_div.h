#ifndef FLASHJAX_CPU_CEIL_DIV_H_
#define FLASHJAX_CPU_CEIL_DIV_H_

#include <cstdint>

namespace flashjax {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flashjax

#endif  // FLASHJAX_CPU_CEIL_DIV_H_
