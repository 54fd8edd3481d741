// What the compiler takes for granted on this architecture: vectors of 4 floats (SSE2, NEON).
#include "portable.h"

namespace paroattn {

Kernel baseline_kernel(Format qk, Format pv, int head_dim) {
  return head_dim <= 64 ? kernel_for_formats<4, 64>(qk, pv) : kernel_for_formats<4, 128>(qk, pv);
}

}  // namespace paroattn
