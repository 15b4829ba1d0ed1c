// The launchers of cuda/ on the emulated device, for ctypes.
#include <cuda.h>

#include <string>

#include "cuda/decode_attention_launch.h"
#include "cuda/gather_matmul_launch.h"
#include "cuda/gather_unpack_launch.h"
#include "cuda/lscd_column_tiles.h"
#include "cuda/lscd_matmul_launch.h"
#include "cuda/lscd_pack_launch.h"
#include "cuda/lscd_sample_launch.h"
#include "cuda/lscd_stream_k.cuh"

namespace {

CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* data,
                     const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                     const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride[0] % 16 != 0 || box[0] * 2 != 128) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {static_cast<uint8_t*>(data), size[0], size[1], stride[0], box[0], box[1]};
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&EncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Every function returns 0, or an error of which emulated_error() says more.
extern "C" {

const char* emulated_error() { return simt::error(); }

void emulated_device(int multiprocessors, int capability) {
  simt::multiprocessors = multiprocessors;
  simt::capability = capability;
}

int emulated_pack_sizes(const uint16_t* dense, int64_t m, int64_t k, uint32_t* chain_segments) {
  return flashjax::LaunchLscdPackSizes(dense, m, k, chain_segments, nullptr);
}

int emulated_pack(const uint16_t* dense, int64_t m, int64_t k, const uint32_t* chain_segments,
                  int64_t segments, uint32_t* bitmap, uint32_t* entries, uint32_t* values,
                  uint32_t* counts) {
  return flashjax::LaunchLscdPack(dense, m, k, chain_segments, segments, bitmap, entries, values,
                                  counts, nullptr);
}

int emulated_unpack(const uint32_t* bitmap, const uint32_t* entries, const uint32_t* values,
                    const int32_t* layer, int64_t layers, int64_t segments, int64_t m, int64_t k,
                    bool transposed, uint16_t* dense) {
  const flashjax::LscdPackedArgs packed{bitmap, entries, values, layer, layers, segments};
  return flashjax::LaunchLscdUnpack(packed, m, k, transposed, dense, nullptr);
}

int64_t emulated_workspace_bytes(int64_t n, int64_t m, int64_t k) {
  return static_cast<int64_t>(flashjax::LscdWorkspaceBytes(n, m, k));
}

int emulated_matmul(const void* x, const uint32_t* bitmap, const uint32_t* entries,
                    const uint32_t* values, const int32_t* layer, int64_t layers, int64_t segments,
                    const void* bias, void* y, void* workspace, int64_t workspace_bytes, int64_t n,
                    int64_t m, int64_t k, bool is_bfloat16, bool is_float_output,
                    bool is_float_bias, bool is_stacked_bias, bool has_relu, int64_t kernel) {
  flashjax::LscdMatmulArgs args{};
  args.x = x;
  args.packed = {bitmap, entries, values, layer, layers, segments};
  args.epilogue.bias = bias;
  args.epilogue.y = y;
  args.workspace = workspace;
  args.workspace_bytes = static_cast<size_t>(workspace_bytes);
  args.n = n;
  args.m = m;
  args.k = k;
  args.is_bfloat16 = is_bfloat16;
  args.epilogue.is_float_output = is_float_output;
  args.epilogue.is_float_bias = is_float_bias;
  args.epilogue.is_stacked_bias = is_stacked_bias;
  args.epilogue.has_relu = has_relu;
  args.kernel = static_cast<flashjax::LscdKernel>(kernel);
  return flashjax::LaunchLscdMatmul(args, nullptr);
}

int emulated_next_tiles(int64_t n, int64_t elements, int64_t* columns_and_width) {
  const flashjax::ColumnTiles tiles = flashjax::NextWgmmaTiles(n, elements);
  columns_and_width[0] = tiles.columns;
  columns_and_width[1] = tiles.width;
  return 0;
}

// Of every tile in the order of a stream-K plan: its row and its column.
int emulated_places(int64_t row_tiles, int64_t column_tiles, int64_t most_in_band,
                    int32_t* places) {
  const flashjax::StreamKPlan plan(row_tiles, column_tiles, most_in_band, 1, 1, false, 0);
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const flashjax::Place place = plan.PlaceOf(tile);
    *places++ = place.row_tile;
    *places++ = place.column_tile;
  }
  return 0;
}

// Where the shares of ranks begin and end, of a column of tiles that are all cut.
int emulated_shares(int64_t tiles, int64_t groups, int64_t ranks, int64_t change_quarters,
                    int32_t* begins) {
  const flashjax::StreamKPlan plan(tiles, 1, 1, groups, ranks, true,
                                   static_cast<int>(change_quarters));
  for (int rank = 0; rank <= ranks; ++rank) {
    begins[rank] = change_quarters > 0 ? plan.Begin<true>(rank) : plan.Begin<false>(rank);
  }
  return 0;
}

int emulated_sample(const float* block, const uint32_t* bitmap, const uint32_t* entries,
                    const int32_t* first_strip, int64_t strips, int64_t m, int64_t k,
                    int64_t segments, float* slots) {
  const flashjax::LscdShape shape{m, k};
  const flashjax::LscdSampleArgs args{shape,       block,  bitmap, entries,
                                      first_strip, strips, slots,  segments};
  return flashjax::LaunchLscdSample(args, nullptr);
}

int emulated_gather_matmul(const void* x, const uint32_t* bitmap, const uint32_t* entries,
                           const uint32_t* values, const int32_t* layer, int64_t layers,
                           int64_t chunks, const void* bias, void* y, int64_t n, int64_t m,
                           int64_t k, bool is_bfloat16, bool is_float_output, bool is_float_bias,
                           bool is_stacked_bias, bool has_relu) {
  flashjax::gather::GatherMatmulArgs args{};
  args.x = x;
  args.packed = {bitmap, entries, values, layer, layers, chunks};
  args.epilogue.bias = bias;
  args.epilogue.y = y;
  args.n = n;
  args.m = m;
  args.k = k;
  args.is_bfloat16 = is_bfloat16;
  args.epilogue.is_float_output = is_float_output;
  args.epilogue.is_float_bias = is_float_bias;
  args.epilogue.is_stacked_bias = is_stacked_bias;
  args.epilogue.has_relu = has_relu;
  return flashjax::gather::LaunchGatherMatmul(args, nullptr);
}

int emulated_gather_unpack(const uint32_t* bitmap, const uint32_t* entries, const uint32_t* values,
                           const int32_t* layer, int64_t layers, int64_t chunks, int64_t m,
                           int64_t k, bool transposed, uint16_t* dense) {
  const flashjax::gather::GatherPackedArgs packed{bitmap, entries, values, layer, layers, chunks};
  return flashjax::gather::LaunchGatherUnpack(packed, m, k, transposed, dense, nullptr);
}

int emulated_decode_attention(const void* queries, const void* keys, const void* values,
                              const uint8_t* mask, const int32_t* used, void* outputs,
                              int64_t batch, int64_t heads, int64_t slots, int64_t head_dim,
                              bool is_bfloat16, bool is_float8_cache) {
  const flashjax::DecodeAttentionArgs args{queries, keys,     values,      mask,
                                           used,    outputs,  batch,       heads,
                                           slots,   head_dim, is_bfloat16, is_float8_cache};
  return flashjax::LaunchDecodeAttention(args, nullptr);
}

}  // extern "C"
