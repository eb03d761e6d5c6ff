// How a video's tokens form cubes of 64, for host plans and kernels alike.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VSA_HOST_DEVICE inline
#endif

namespace vsa {

constexpr int kCubeTokens = 64;
constexpr int kThinTokens = 16;

// Sizes that plans and kernels must agree on.
constexpr int kHalfBytes = 2;         // bf16 and fp16
constexpr int kBarrierBytes = 8;      // an mbarrier
constexpr int kTileAlignment = 1024;  // of a 128-byte-swizzled tile, and so of the struct that holds it

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

// Three numbers along time, height and width.
struct Extent3 {
  int32_t t, h, w;

  bool operator==(const Extent3&) const = default;
};

// Tokens in raster order (time outermost) on `video`, cut into cubes of 2^log2_cube tokens a side; cubes in
// raster order. Cubes at the far edges may be partial. Slot s of a cube, as a box of the copy engine lands
// it, is the token at (s / (h * w), s / w % h, s % w) of the cube.
struct CubeGrid {
  Extent3 video;
  Extent3 log2_cube;
  Extent3 cubes;
  uint32_t reciprocal_w, reciprocal_h;  // of cubes.w and cubes.h: see divide()
  int32_t total_cubes;

  bool operator==(const CubeGrid&) const = default;

  VSA_HOST_DEVICE int num_cubes() const { return total_cubes; }
  VSA_HOST_DEVICE int64_t num_tokens() const { return int64_t(video.t) * video.h * video.w; }

  // Cube number `position` when time runs fastest. Neighbours in this order are neighbours in time, whose
  // lists overlap most on real video (bench/NOTES.md), so that a CTA that takes a few of them loads least.
  VSA_HOST_DEVICE int cube_along_time(int position) const {
    int column = position / cubes.t;
    return (position - column * cubes.t) * cubes.h * cubes.w + column;
  }

  // First token of a cube.
  VSA_HOST_DEVICE Extent3 origin(int cube) const {
    int row = divide(cube, cubes.w, reciprocal_w);
    int plane = divide(row, cubes.h, reciprocal_h);
    return {plane << log2_cube.t, (row - plane * cubes.h) << log2_cube.h,
            (cube - row * cubes.w) << log2_cube.w};
  }

  VSA_HOST_DEVICE bool is_full(Extent3 origin) const {
    return origin.t + (1 << log2_cube.t) <= video.t && origin.h + (1 << log2_cube.h) <= video.h &&
           origin.w + (1 << log2_cube.w) <= video.w;
  }

  // Real tokens along each side of the cube at `origin`.
  VSA_HOST_DEVICE Extent3 sides(Extent3 origin) const {
    return {smaller(1 << log2_cube.t, video.t - origin.t), smaller(1 << log2_cube.h, video.h - origin.h),
            smaller(1 << log2_cube.w, video.w - origin.w)};
  }

  // The side along which tokens fill at most a quarter of the cube at `origin`, the first of these (0: time);
  // -1 where there is none. Such a cube is thin: its tokens lie in a box of kThinTokens.
  VSA_HOST_DEVICE int thin_side(Extent3 origin) const {
    if (4 * (video.t - origin.t) <= 1 << log2_cube.t) return 0;
    if (4 * (video.h - origin.h) <= 1 << log2_cube.h) return 1;
    if (4 * (video.w - origin.w) <= 1 << log2_cube.w) return 2;
    return -1;
  }

  // The grid whose cubes are a quarter along `side`: slots 0 to kThinTokens - 1 of the one at a thin cube's
  // origin are its tokens.
  VSA_HOST_DEVICE CubeGrid thinned(int side) const {
    CubeGrid grid = *this;
    if (side == 0) grid.log2_cube.t -= 2;
    if (side == 1) grid.log2_cube.h -= 2;
    if (side == 2) grid.log2_cube.w -= 2;
    return grid;
  }

  VSA_HOST_DEVICE Extent3 slot_offset(int slot) const {
    return {slot >> (log2_cube.h + log2_cube.w), slot >> log2_cube.w & ((1 << log2_cube.h) - 1),
            slot & ((1 << log2_cube.w) - 1)};
  }

  // The slot of the thinned grid's cube at `origin` that has the token of `slot` in this one's, which is
  // thin; -1 of tokens outside the video.
  VSA_HOST_DEVICE int thin_slot(Extent3 origin, int slot) const {
    CubeGrid grid = thinned(thin_side(origin));
    Extent3 at = slot_offset(slot), log2 = grid.log2_cube;
    if (at.t >> log2.t || at.h >> log2.h || at.w >> log2.w) return -1;
    return (((at.t << log2.h) + at.h) << log2.w) + at.w;
  }

  // Raster index of a cube's slot, or -1 where the slot lies outside the video. Fewer than 2^25 cubes, so
  // that it fits an int.
  VSA_HOST_DEVICE int64_t token(Extent3 origin, int slot) const {
    Extent3 offset = slot_offset(slot);
    Extent3 at = {origin.t + offset.t, origin.h + offset.h, origin.w + offset.w};
    if (at.t >= video.t || at.h >= video.h || at.w >= video.w) return -1;
    return (at.t * video.h + at.h) * video.w + at.w;
  }

  // Where a raster token lies: cube * 64 + slot. Fewer than 2^25 cubes, so both fit an int.
  VSA_HOST_DEVICE int place_of(int token) const {
    int row = token / video.w, t = row / video.h;
    int h = row - t * video.h, w = token - row * video.w;
    int cube = ((t >> log2_cube.t) * cubes.h + (h >> log2_cube.h)) * cubes.w + (w >> log2_cube.w);
    int dt = t & ((1 << log2_cube.t) - 1), dh = h & ((1 << log2_cube.h) - 1);
    return cube * kCubeTokens + (((dt << log2_cube.h) + dh) << log2_cube.w) + (w & ((1 << log2_cube.w) - 1));
  }

  // The cube that holds a raster token.
  VSA_HOST_DEVICE int cube_of(int64_t token) const { return place_of(int(token)) / kCubeTokens; }

  // Bit s is set where slot s is a real token.
  VSA_HOST_DEVICE uint64_t valid_slots(Extent3 origin) const {
    if (is_full(origin)) return ~uint64_t(0);
    Extent3 side = sides(origin);
    uint64_t row = ones(side.w), plane = 0, mask = 0;
    for (int h = 0; h < side.h; h++) plane |= row << (h << log2_cube.w);
    for (int t = 0; t < side.t; t++) mask |= plane << (t << (log2_cube.h + log2_cube.w));
    return mask;
  }

  // n / d for n below 2^31, by reciprocal(d) instead of a division: one multiplication finds it or one less.
  VSA_HOST_DEVICE static int divide(int n, int d, uint32_t reciprocal) {
    int quotient = int(uint64_t(uint32_t(n)) * reciprocal >> 32);
    return quotient + (n - quotient * d >= d);
  }
  static uint32_t reciprocal(int d) { return d == 1 ? ~uint32_t(0) : uint32_t((uint64_t(1) << 32) / d); }

  VSA_HOST_DEVICE static uint64_t ones(int count) {
    return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
  }
  VSA_HOST_DEVICE static int smaller(int a, int b) { return a < b ? a : b; }
};

// Where the copy engine finds a cube of one head of a token tensor: coordinate 0 of its 64-column panel p is
// head * head_in_columns + 64 p, coordinates 1 to 3 the cube's w, h, t, coordinate 4 is
// batch * batch_in_outer + head * head_in_outer. Which of the two the head uses depends on the strides.
struct CubeCoordinates {
  int32_t head_in_columns;
  int32_t head_in_outer;
  int32_t batch_in_outer;
};

}  // namespace vsa
