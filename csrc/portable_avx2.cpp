// AVX2 with FMA: vectors of 8 floats.
#include "portable.h"

namespace paroattn {

Kernel avx2_kernel(Format qk, Format pv, int head_dim) {
  return head_dim <= 64 ? kernel_for_formats<8, 64>(qk, pv) : kernel_for_formats<8, 128>(qk, pv);
}

}  // namespace paroattn
