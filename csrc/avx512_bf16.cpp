// AVX-512 with VNNI and BF16.
#include "avx512.h"

namespace paroattn {

Kernel avx512_bf16_kernel(Format qk, Format pv, int head_dim) {
  return narrowest_kernel(qk, pv, head_dim);
}

}  // namespace paroattn
