// Runs the stages of all heads on several threads.
#pragma once

#include <vector>

#include "attention.h"

namespace paroattn {

enum class Capability { kBaseline, kAvx2, kAvx512Vnni, kAvx512Bf16 };

// The best one that this CPU and this build have.
Capability best_capability();

struct Report {
  int64_t visited_blocks;   // pairs of 64-token blocks that were computed
  double prologue_seconds;  // until k and v were packed
};

// Fills the outputs of `heads`. They do not depend on `threads`.
Report run(std::vector<Head>& heads, Capability capability, int threads);

}  // namespace paroattn
