// AVX-512 with VNNI and BF16.
#include "avx512.h"

namespace paroattn {

Kernel avx512_bf16_kernel(Format qk, Format pv, int head_dim) {
  return head_dim <= 64 ? kernel_for_formats<64>(qk, pv) : kernel_for_formats<128>(qk, pv);
}

}  // namespace paroattn
