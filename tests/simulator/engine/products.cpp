#include "products.h"

namespace sim {

void multiply(const LanesA& a, const LanesB& b, float* const accumulators[4], bool accumulate) {
  for (int upper = 0; upper < 2; upper++) {
    for (int odd = 0; odd < 2; odd++) {
      alignas(64) float sum[kLanes] = {};
      for (int k = 0; k < 16; k++) {
        for (int lane = 0; lane < kLanes; lane++) {
          sum[lane] = __builtin_fmaf(a.value[upper][k][lane], b.value[odd][k][lane], sum[lane]);
        }
      }
      float* out = accumulators[2 * upper + odd];
      for (int lane = 0; lane < kLanes; lane++) out[lane] = accumulate ? out[lane] + sum[lane] : sum[lane];
    }
  }
}

}  // namespace sim
