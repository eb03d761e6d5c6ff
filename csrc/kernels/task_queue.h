#pragma once

namespace vsa {

// Of a TaskQueue.
constexpr int kTaskQueueWarps = 16;  // at most in a CTA
constexpr int kTaskQueueBytes = 40 + 4 * kTaskQueueWarps;

}  // namespace vsa
