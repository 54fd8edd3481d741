// What the compiler takes for granted on this architecture: vectors of 4 floats (SSE2, NEON).
#include "portable.h"

namespace paroattn {

Kernel baseline_kernel(Format qk, Format pv, int head_dim) {
  return narrowest_kernel<4>(qk, pv, head_dim);
}

}  // namespace paroattn
