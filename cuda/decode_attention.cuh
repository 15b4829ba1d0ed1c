// Attention of one new token of every sequence to the keys and values of those before it.
//
// A step of decoding reads the whole cache once and multiplies each number once: nothing but
// reading counts. A CTA has one head of one sequence. Its warps take turns at a few slots each,
// whose keys and values are asked for together, 16 bytes a lane; a row of lanes holds a slot, and
// keeps the largest score, the sum of weights and the weighted values of its own slots (Milakov and
// Gimelshein 2018, "Online normalizer calculation for softmax"). In the end these are merged, in a
// fixed order.
#ifndef FLASHJAX_CUDA_DECODE_ATTENTION_CUH_
#define FLASHJAX_CUDA_DECODE_ATTENTION_CUH_

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda/common/floats.cuh"
#include "cuda/common/ptx.cuh"

namespace flashjax {

struct DecodeAttention {
  const void* queries;  // (batch, heads, head_dim), scaled
  const void* keys;     // (batch, heads, slots, head_dim)
  const void* values;
  const uint8_t* mask;  // (batch, slots): slots that may be attended to
  const int32_t* used;  // slots that have been written
  void* outputs;        // (batch, heads, head_dim)
  int heads, slots;
};

// T is the type of queries and outputs, Cache that of keys and values.
template <typename Cache, int kHeadDim>
struct DecodeAttentionConfig {
  static constexpr int kMaxWarps = 16;
  static constexpr int kPart = 16 / static_cast<int>(sizeof(Cache));  // numbers of a lane
  static constexpr int kRowLanes = kHeadDim / kPart;                  // lanes of a slot
  static constexpr int kRows = 32 / kRowLanes;                        // slots of a warp's load
  static constexpr int kLoads = 4;                                    // under way, of keys
  static constexpr int kWarpSlots = kRows * kLoads;
  static_assert(kRowLanes * kPart == kHeadDim && kRows * kRowLanes == 32);
};

// What has been attended to so far, by one row of lanes; `values` are a lane's part.
template <int kPart>
struct Attended {
  float largest = -FLT_MAX, weight = 0;
  float values[kPart] = {};

  __device__ __forceinline__ void Merge(float other_largest, float other_weight,
                                        const float other_values[kPart]) {
    const float most = fmaxf(largest, other_largest);
    const float mine = FastExp(largest - most), others = FastExp(other_largest - most);
    largest = most;
    weight = weight * mine + other_weight * others;
#pragma unroll
    for (int i = 0; i < kPart; ++i) values[i] = values[i] * mine + other_values[i] * others;
  }
};

template <typename T, typename Cache, int kHeadDim>
__global__ void __launch_bounds__(DecodeAttentionConfig<Cache, kHeadDim>::kMaxWarps * 32)
    DecodeAttentionKernel(const __grid_constant__ DecodeAttention p) {
  using Config = DecodeAttentionConfig<Cache, kHeadDim>;
  constexpr int kPart = Config::kPart, kRowLanes = Config::kRowLanes, kLoads = Config::kLoads;
  __shared__ float shared[Config::kMaxWarps][kHeadDim + 2];

  const int lane = LaneId(), warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int row = lane / kRowLanes, part = lane % kRowLanes;
  const int64_t head = blockIdx.x;
  const uint8_t* mask = p.mask + head / p.heads * p.slots;
  const int used = min(*p.used, p.slots);

  float query[kPart];
  const uint32_t* query_words =
      static_cast<const uint32_t*>(p.queries) + (head * kHeadDim + part * kPart) / 2;
#pragma unroll
  for (int i = 0; i < kPart / 2; ++i) ToFloats<T>(query_words[i], query + 2 * i);

  // In units of 16 bytes.
  const int64_t first = head * p.slots * kRowLanes + lane;
  const uint4* keys = static_cast<const uint4*>(p.keys) + first;
  const uint4* values = static_cast<const uint4*>(p.values) + first;

  Attended<kPart> sum;
  for (int slot0 = warp * Config::kWarpSlots; slot0 < used; slot0 += warps * Config::kWarpSlots) {
    uint4 key[kLoads], value[kLoads];
    bool is_used[kLoads], is_masked[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int slot = slot0 + u * Config::kRows + row;
      is_used[u] = slot < used;
      is_masked[u] = false;
      key[u] = value[u] = make_uint4(0, 0, 0, 0);
      if (is_used[u]) {
        const int64_t at = int64_t{slot0 + u * Config::kRows} * kRowLanes;
        key[u] = LoadStreaming(keys + at);
        value[u] = LoadStreaming(values + at);
        is_masked[u] = mask[slot] == 0;
      }
    }
    float score[kLoads];
    float most = sum.largest;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      float k[kPart], product = 0;
      ToFloats<Cache>(key[u], k);
#pragma unroll
      for (int i = 0; i < kPart; ++i) product = fmaf(query[i], k[i], product);
#pragma unroll
      for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
        product += __shfl_xor_sync(0xffffffffu, product, offset);
      }
      // Finite where masked: who may attend to nothing attends to all alike, and is not NaN.
      score[u] = !is_used[u] ? -INFINITY : is_masked[u] ? -FLT_MAX : product;
      most = fmaxf(most, score[u]);
    }
    const float scale = FastExp(sum.largest - most);
    sum.largest = most;
    sum.weight *= scale;
#pragma unroll
    for (int i = 0; i < kPart; ++i) sum.values[i] *= scale;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const float weight = FastExp(score[u] - most);
      sum.weight += weight;
      float v[kPart];
      ToFloats<Cache>(value[u], v);
#pragma unroll
      for (int i = 0; i < kPart; ++i) sum.values[i] = fmaf(weight, v[i], sum.values[i]);
    }
  }

#pragma unroll
  for (int offset = kRowLanes; offset < 32; offset *= 2) {
    float others[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      others[i] = __shfl_xor_sync(0xffffffffu, sum.values[i], offset);
    }
    const float largest = __shfl_xor_sync(0xffffffffu, sum.largest, offset);
    const float weight = __shfl_xor_sync(0xffffffffu, sum.weight, offset);
    sum.Merge(largest, weight, others);
  }
  if (row == 0) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) shared[warp][part * kPart + i] = sum.values[i];
    if (part == 0) {
      shared[warp][kHeadDim] = sum.largest;
      shared[warp][kHeadDim + 1] = sum.weight;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kHeadDim; i += blockDim.x) {
    Attended<1> total;
    for (int w = 0; w < warps; ++w) {
      total.Merge(shared[w][kHeadDim], shared[w][kHeadDim + 1], &shared[w][i]);
    }
    static_cast<T*>(p.outputs)[head * kHeadDim + i] = FromFloat<T>(total.values[0] / total.weight);
  }
}

}  // namespace flashjax

#endif  // FLASHJAX_CUDA_DECODE_ATTENTION_CUH_
