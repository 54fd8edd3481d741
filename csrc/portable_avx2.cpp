// AVX2 with FMA: vectors of 8 floats.
#include "portable.h"

namespace paroattn {

Kernel avx2_kernel(Format qk, Format pv, int head_dim) {
  return narrowest_kernel<8>(qk, pv, head_dim);
}

}  // namespace paroattn
