// Victim: C = A * B^T, A [M, K], B [N, K], C [M, N] in bf16, one 64 x 64 tile of C a CTA. The sum so far is
// scaled by `decay` before each 64 columns of K, so that accumulators are modified between products. A
// producer warpgroup loads 64 x 64 tiles by TMA into a ring of kStages; a consumer warpgroup multiplies them
// by wgmma and stores C by TMA, 32 columns at a time through one shared buffer. Comments `// at:` survive
// into the PTX, where the planted faults find their place.
#include <cuda_bf16.h>

#include <cuda/ptx>

namespace ptx = cuda::ptx;

struct TensorMap {
  alignas(64) unsigned char opaque[128];
};

struct Maps {
  TensorMap a;  // [M, K] bf16, box 64 x 64, 128-byte swizzle
  TensorMap b;  // [N, K] bf16, box 64 x 64, 128-byte swizzle
  TensorMap c;  // [M, N] bf16, box 32 x 64, 64-byte swizzle
};

struct Params {
  int k_tiles;
  float decay;
};

constexpr int kStages = 3;
constexpr int kTileBytes = 64 * 64 * 2;

struct __align__(1024) Shared {
  unsigned char a[kStages][kTileBytes];
  unsigned char b[kStages][kTileBytes];
  unsigned char c[64 * 32 * 2];
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ void wait(uint64_t* barrier, uint32_t phase) {
  while (!ptx::mbarrier_try_wait_parity(barrier, phase)) {
  }
}

// K-major tile of 128-byte rows, 128-byte swizzle: 8 rows are 1024 bytes.
__device__ uint64_t descriptor(const void* tile) {
  uint64_t address = __cvta_generic_to_shared(tile);
  return (address >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
        "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
        "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

// Keeps the compiler from moving arithmetic on the accumulators across the asm before or behind it.
__device__ void pin(float (&d)[32]) {
  for (float& value : d) asm volatile("" : "+f"(value)::"memory");
}

__device__ void produce(const Maps& maps, int k_tiles, Shared& shared) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  if (threadIdx.x != 0) return;
  Ring ring;
  for (int k = 0; k < k_tiles; ++k, ring.advance()) {
    uint64_t* full = &shared.full[ring.stage];
    asm volatile("// at: wait empty");
    wait(&shared.empty[ring.stage], ring.phase ^ 1);
    asm volatile("// at: load");
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full, 2 * kTileBytes);
    const int32_t at_a[2] = {k * 64, static_cast<int32_t>(blockIdx.y) * 64};
    const int32_t at_b[2] = {k * 64, static_cast<int32_t>(blockIdx.x) * 64};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared.a[ring.stage], &maps.a, at_a,
                              full);
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared.b[ring.stage], &maps.b, at_b,
                              full);
  }
}

__device__ void consume(const Maps& maps, int k_tiles, float decay, Shared& shared) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int thread = threadIdx.x - 128;
  float d[32] = {};
  Ring ring;
  for (int k = 0; k < k_tiles; ++k, ring.advance()) {
    asm volatile("// at: wait full");
    wait(&shared.full[ring.stage], ring.phase);
    asm volatile("// at: multiply");
    const uint64_t a = descriptor(shared.a[ring.stage]);
    const uint64_t b = descriptor(shared.b[ring.stage]);
    for (float& value : d) value *= decay;
    pin(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int slice = 0; slice < 4; ++slice) multiply(d, a + 2 * slice, b + 2 * slice);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(d);
    asm volatile("// at: release");
    if (thread % 32 == 0) ptx::mbarrier_arrive(&shared.empty[ring.stage]);
  }
  asm volatile("// at: epilogue");
  const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1) {
      if (thread == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{});
      asm volatile("bar.sync 1, 128;" ::: "memory");
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = row + i % 2 * 8;
      const int chunk = (i / 2) ^ (r >> 1 & 3);
      const int source = half * 16 + i / 2 * 4 + i % 2 * 2;
      const __nv_bfloat162 pair = __floats2bfloat162_rn(d[source], d[source + 1]);
      *reinterpret_cast<__nv_bfloat162*>(shared.c + r * 64 + chunk * 16 + thread % 4 * 4) = pair;
    }
    ptx::fence_proxy_async(ptx::space_shared);
    asm volatile("bar.sync 2, 128;" ::: "memory");
    if (thread == 0) {
      const int32_t at_c[2] = {static_cast<int32_t>(blockIdx.x) * 64 + half * 32,
                               static_cast<int32_t>(blockIdx.y) * 64};
      ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &maps.c, at_c, shared.c);
      ptx::cp_async_bulk_commit_group();
    }
  }
  if (thread == 0) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>{});
}

extern "C" __global__ void __launch_bounds__(256, 1)
    matmul(const __grid_constant__ Maps maps, const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], 4);  // one arrival a consumer warp
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    produce(maps, params.k_tiles, shared);
  } else {
    consume(maps, params.k_tiles, params.decay, shared);
  }
}
