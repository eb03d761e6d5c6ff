// Lists of key blocks per query block -> lists of query blocks per key block, as compressed rows, query
// blocks ascending.
//
// A counting sort without a temporary in global memory. A cluster takes one head, each of its CTAs an equal
// run of query blocks, which it walks 32 at a time: warp i sets bit i in the masks of the key blocks that
// query block i lists. The bits of a mask are its query blocks in ascending order, whoever set them first:
// the result is the same every time.
//
//   count    masks -> counts[key block] of this CTA
//   scan     counts of all CTAs -> offsets of the rows, and where in each row this CTA's run starts
//   fill     masks again -> query block numbers to their places
//
// More key blocks than shared memory has counts for are done in passes over the lists.
#pragma once

#include "kernels/transpose_index_params.h"
#include "tiles/cluster.cuh"

namespace vsa {

struct TransposeShared {
  int* counts;       // [keys_per_pass], of this CTA
  int* cursors;      // [keys_per_pass], where this CTA writes next
  uint32_t* masks;   // [keys_per_pass], all zero between groups
  int* warp_totals;  // [32]
  int* total;        // pairs of the key blocks done
};

// Calls visit(key, mask, first_query) for each group of 32 query blocks and each key block of the pass, in
// this order.
template <class Visit>
VSA_DEVICE void transpose_walk(const TransposeIndexParams& params, const TransposeShared& shared, int batch,
                               int head, int first_key, int keys, Visit visit) {
  int queries_per_cta = round_up(ceil_div(params.num_q_blocks, kTransposeCtas), kWarpThreads);
  int first = cluster_cta() * queries_per_cta;
  int end = min(first + queries_per_cta, params.num_q_blocks);
  int warp = warp_id();
  for (int group = first; group < end; group += kWarpThreads) {
    int query = group + warp;
    if (query < end) {
      int count = params.lists.count(batch, head, query);
      const int32_t* list = params.lists.list(batch, head, query);
#pragma unroll 4
      for (int i = lane_id(); i < count; i += kWarpThreads) {
        uint32_t key = list[i] - first_key;
        if (key < uint32_t(keys)) atomicOr(shared.masks + key, 1u << warp);
      }
    }
    __syncthreads();
    for (int key = threadIdx.x; key < keys; key += kTransposeThreads) {
      visit(key, shared.masks[key], group);
      shared.masks[key] = 0;
    }
    __syncthreads();
  }
}

// Exclusive sum over the CTA's threads; *sum becomes the sum over all. Two barriers.
VSA_DEVICE int exclusive_scan(int value, int* warp_totals, int& sum) {
  int inclusive = value, warp = warp_id();
#pragma unroll
  for (int lanes = 1; lanes < kWarpThreads; lanes *= 2) {
    int below = __shfl_up_sync(0xffffffffu, inclusive, lanes);
    if (lane_id() >= lanes) inclusive += below;
  }
  if (lane_id() == kWarpThreads - 1) warp_totals[warp] = inclusive;
  __syncthreads();
  int warps_before = 0;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kTransposeThreads / kWarpThreads; i++) {
    int total = warp_totals[i];
    if (i < warp) warps_before += total;
    sum += total;
  }
  __syncthreads();
  return warps_before + inclusive - value;
}

// Offsets of the pass's rows, after those of `done` pairs; sets the cursors and returns the pairs done now.
VSA_DEVICE int transpose_scan(const TransposeShared& shared, int32_t* offsets, int keys, int done) {
  for (int first = 0; first < keys; first += kTransposeThreads) {
    int key = first + threadIdx.x;
    int row = 0, before = 0;
    if (key < keys) {
#pragma unroll
      for (int cta = 0; cta < kTransposeCtas; cta++) {
        int count = load_remote(shared.counts + key, cta);
        if (cta < cluster_cta()) before += count;
        row += count;
      }
    }
    int sum;
    int offset = done + exclusive_scan(row, shared.warp_totals, sum);
    done += sum;
    if (key < keys) {
      shared.cursors[key] = offset + before;
      if (cluster_cta() == 0) offsets[key] = offset;
    }
  }
  return done;
}

VSA_DEVICE void transpose_lists(const TransposeIndexParams& params) {
  extern __shared__ int shared_words[];
  int capacity = params.keys_per_pass;
  TransposeShared shared;
  shared.counts = shared_words;
  shared.cursors = shared.counts + capacity;
  shared.masks = reinterpret_cast<uint32_t*>(shared.cursors + capacity);
  shared.warp_totals = shared.cursors + 2 * capacity;
  for (int key = threadIdx.x; key < capacity; key += kTransposeThreads) shared.masks[key] = 0;

  int row = blockIdx.x / kTransposeCtas, batch = row / params.heads, head = row % params.heads;
  int32_t* offsets = params.q_offsets + int64_t(row) * (params.num_kv_blocks + 1);
  int32_t* indices = params.q_indices + int64_t(row) * params.num_q_blocks * params.max_blocks;
  int done = 0;
  for (int first = 0; first < params.num_kv_blocks; first += capacity) {
    int keys = min(capacity, params.num_kv_blocks - first);
    for (int key = threadIdx.x; key < keys; key += kTransposeThreads) shared.counts[key] = 0;
    __syncthreads();
    transpose_walk(params, shared, batch, head, first, keys,
                   [&shared](int key, uint32_t mask, int) { shared.counts[key] += __popc(mask); });
    cluster_sync();
    done = transpose_scan(shared, offsets + first, keys, done);
    cluster_sync();  // all have read these counts
    transpose_walk(params, shared, batch, head, first, keys,
                   [&shared, indices](int key, uint32_t mask, int first_query) {
                     int at = shared.cursors[key];
                     for (; mask; mask &= mask - 1) indices[at++] = first_query + __ffs(mask) - 1;
                     shared.cursors[key] = at;
                   });
  }
  if (cluster_cta() == 0 && threadIdx.x == 0) offsets[params.num_kv_blocks] = done;
  int64_t end = int64_t(params.num_q_blocks) * params.max_blocks;
  int64_t stride = kTransposeCtas * kTransposeThreads;
  for (int64_t i = done + cluster_cta() * kTransposeThreads + threadIdx.x; i < end; i += stride)
    indices[i] = 0;
}

}  // namespace vsa
